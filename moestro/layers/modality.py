"""Which modality a token is of: a fact of its id, so that it is known while decoding too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moestro.core.routing import RouteContext
from moestro.layers.site import require

TEXT, IMAGE = 0, 1
IMAGE_IDS = (14, 31)  # the grey levels of `samples:digits` in the byte tokenizer: first, and after the last


def image_ids(given: Sequence[int] | None) -> tuple[int, int]:
    """The option of methods that tell images from text: [first, after the last], None for the grey levels of samples."""
    pair = IMAGE_IDS if given is None else tuple(given)
    require(len(pair) == 2 and 0 <= pair[0] < pair[1], f"image ids {list(pair)}", "[first, after the last]")
    return int(pair[0]), int(pair[1])


def modality_of(ids: Tensor, image: tuple[int, int]) -> Tensor:
    """int64, TEXT or IMAGE, in the shape of the ids."""
    return ((ids >= image[0]) & (ids < image[1])).long()


def modality_T(ctx: RouteContext, tokens: int, image: tuple[int, int]) -> Tensor:
    """The modality of each token of a routing; text where ids are unknown."""
    return torch.zeros(tokens, dtype=torch.int64) if ctx.token_ids_T is None else modality_of(ctx.token_ids_T, image)
