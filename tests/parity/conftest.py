"""Tiny checkpoints of every family, written once per test run, with the transformers module they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.layout import Layout


class Saved(NamedTuple):
    """A checkpoint, its layout, and a float32 module that holds exactly its weights, loaded by nothing of moestro's."""

    folder: Path
    checkpoint: Checkpoint
    layout: Layout
    reference: Any


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    from moestro.testing.tiny import save_tiny

    made: dict[tuple[str, str | None, str], Saved] = {}

    def make(family: str, layout: str | None = None, dtype: str = "float32") -> Saved:
        key = (family, layout, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}-{dtype}")
            reference = save_tiny(family, folder, layout, dtype)
            checkpoint = Checkpoint.open(folder)
            made[key] = Saved(folder, checkpoint, describe(checkpoint), reference)
        return made[key]

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
