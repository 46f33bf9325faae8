"""One sequence read by a live module with its cache of keys and values, forwards and back. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moestro.models.open import Model


def crop(cache: Any, tokens: int) -> bool:
    """Take the last `tokens` tokens out of transformers' cache; False, and the cache is spoilt, where a layer cannot."""
    if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        return False
    try:
        cache.crop(-tokens)
    except (RuntimeError, ValueError):  # a window has moved on
        return False
    return True


class LiveReading:
    """A core Reading of `Model`. A state that is more than keys and values is read one token at a time after its first pass."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tokens: list[int] = []
        self._cache: Any = None

    def read(self, tokens: Sequence[int], *, every: bool = False) -> np.ndarray:
        from transformers.cache_utils import DynamicCache

        model, new = self._model, list(map(int, tokens))
        model.check(new)
        if not self._tokens:
            self._cache = DynamicCache(config=model.module.config)
        whole = not self._tokens or not any(hasattr(layer, "recurrent_states") for layer in self._cache.layers)
        rows = [self._pass(piece, every) for piece in ([new] if whole else [[token] for token in new])]
        return np.concatenate(rows) if every else rows[-1]

    def _pass(self, tokens: list[int], every: bool) -> np.ndarray:
        import torch

        first = len(self._tokens)
        ids_T, position_T = torch.tensor(tokens), torch.arange(first, first + len(tokens))
        with self._model.told(ids_T, position_T, 0), torch.no_grad():
            out = self._model.module(
                input_ids=ids_T[None],
                position_ids=position_T[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if every else 1,
            )
        self._tokens += tokens
        return out.logits[0].float().numpy()

    def back(self, length: int) -> None:
        kept, gone = self._tokens[:length], len(self._tokens) - length
        if gone <= 0:
            return
        if kept and crop(self._cache, gone):
            self._tokens = kept
            return
        self._tokens = []
        if kept:
            self.read(kept)
