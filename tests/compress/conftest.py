"""Tiny random models with plans made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from moestro.core.plan import Subject
from moestro.core.plans.compression import CompressionPlan, LayerChange, Row, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.layout import Layout
from moestro.testing.tiny import save_tiny

# The tiny models' groups of two experts are as small as groups can be.
CHANGES = {name: {"n_group": 2, "topk_group": 1} for name in ("deepseek_v2_groups", "deepseek_v3")}


class Saved(NamedTuple):
    folder: Path
    checkpoint: Checkpoint
    layout: Layout


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(family, layout, dtype) -> folder, checkpoint and layout, made once."""
    made: dict[tuple, Saved] = {}

    def get(family: str, layout: str | None = None, dtype: str = "float32") -> Saved:
        if (family, layout, dtype) not in made:
            folder = tmp_path_factory.mktemp(family) / "model"
            save_tiny(family, folder, layout, dtype, **CHANGES.get(family, {}))
            checkpoint = Checkpoint.open(folder)
            made[family, layout, dtype] = Saved(folder, checkpoint, describe(checkpoint))
        return made[family, layout, dtype]

    return get


def subject(one: Saved) -> tuple[Subject, ...]:
    return (Subject(str(one.folder), one.layout.facts.fingerprint),)


def some_experts(one: Saved) -> list[int]:
    """Experts to keep: as few as the family's groups and top-k allow, never all, and not the first ones."""
    facts = one.layout.facts.layers[0]
    groups, size = facts.router.groups, facts.num_experts // facts.router.groups
    keep = -(-facts.top_k // facts.router.groups_kept)
    assert 2 <= keep < size
    return [g * size + i for g in range(groups) for i in range(size - keep, size)]


def pruning(one: Saved, **fields: Any) -> CompressionPlan:
    kept = some_experts(one)
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in kept)) for la in one.layout.facts.layers)
    return CompressionPlan(subjects=subject(one), method="by.hand", layers=layers, **fields)


def merging(one: Saved, *, slim: int = 0, repoint: bool = False) -> CompressionPlan:
    """The kept experts, the first of them merged with the experts that are not kept, aligned by a drawn order."""
    rng, layers = np.random.default_rng(0), []
    for la in one.layout.facts.layers:
        kept = some_experts(one)
        lost = [e for e in range(la.num_experts) if e not in kept] or [kept[1]]
        order = tuple(int(i) for i in rng.permutation(la.spec.d_expert))
        neurons = tuple(sorted(int(i) for i in rng.permutation(la.spec.d_expert)[:slim])) if slim else ()
        share = 1 / (2 * len(lost))
        first = Slot((kept[0], *lost), (0.5, *[share] * len(lost)), ((), *[order] * len(lost)), neurons)
        slots = (first, *(Slot((e,), neurons=neurons) for e in kept[1:]))
        rows = (Row(0, first.sources, first.coefficients), *(Row(i + 1, (e,)) for i, e in enumerate(kept[1:])))
        if repoint:
            rows = tuple(Row(kept.index(e) if e in kept else 0, (e,)) for e in range(la.num_experts))
        layers.append(LayerChange(la.ordinal, slots, rows))
    return CompressionPlan(subjects=subject(one), method="by.hand", layers=tuple(layers))
