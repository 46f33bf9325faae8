"""Tiny checkpoints on disk, made once per run, and engines over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moestro.core.plan import Subject
from moestro.core.plans.residency import Memory, ResidencyPlan
from moestro.engine.engine import Engine
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.layout import Layout


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """tiny(family, layout, dtype, **changes) -> (folder, the float32 transformers module with the same weights), cached."""
    import torch

    from moestro.testing.tiny import save_tiny

    torch.set_num_threads(1)
    made: dict[Any, tuple[Path, Any]] = {}

    def make(family: str, layout: str | None = None, dtype: str = "float32", **changes: Any) -> tuple[Path, Any]:
        name = (family, layout, dtype, *sorted(changes.items()))
        if name not in made:
            folder = tmp_path_factory.mktemp(family)
            made[name] = folder, save_tiny(family, folder, layout, dtype, **changes)
        return made[name]

    return make


def open_folder(folder: Path) -> tuple[Checkpoint, Layout]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, describe(checkpoint)


def hand_plan(layout: Layout, size: str = "full", **changes: Any) -> ResidencyPlan:
    """A plan without a planner: size 'minimal' (top-k slots), 'medium' or 'full'; changes are fields of the plan."""
    scope = changes.setdefault("scope", "layer")
    layers = layout.facts.layers
    middle = [max(la.top_k, la.num_experts * 2 // 3) for la in layers]
    per_layer = {"minimal": [la.top_k for la in layers], "medium": middle, "full": [la.num_experts for la in layers]}[size]
    slots = (max(la.top_k for la in layers) if size == "minimal" else sum(per_layer),) if scope == "global" else tuple(per_layer)
    fields: dict[str, Any] = {
        "subjects": (Subject("tiny", layout.facts.fingerprint),),
        "method": "by hand",
        "memory": Memory(0, 0, 0, 0, 0, 0),
        "slots": slots,
        "eviction": "engine.evict.lru",
        "predictor": "engine.predict.none",
        "context": 256,
    }
    return ResidencyPlan(**(fields | changes))


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], tuple[Checkpoint, Layout]]:
    return open_folder


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., ResidencyPlan]:
    return hand_plan


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """engine(folder, size, store=..., trace=..., **plan fields), closed at the end of the test."""

    def make(folder: Path, size: str = "full", *, store: Any = None, trace: bool = False, **changes: Any) -> Engine:
        checkpoint, layout = open_folder(folder)
        codec = {} if store is None else {"codec": store.codec}
        made = Engine(checkpoint, layout, hand_plan(layout, size, **(codec | changes)), store=store, threads=1, trace=trace)
        request.addfinalizer(made.close)
        return made

    return make
