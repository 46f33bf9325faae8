"""Narrower experts: every slot keeps its best neurons, by a method of kind 'neurons'."""

from __future__ import annotations

from typing import Any

import numpy as np

from moestro.compress.slots import build
from moestro.compress.stats import LayerStats
from moestro.core.errors import PlanError
from moestro.core.experts import ExpertKey
from moestro.core.plans.compression import LayerChange, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.layout import Layout


def slimmed(
    fn: Any,
    stats: LayerStats,
    change: LayerChange,
    checkpoint: Checkpoint,
    layout: Layout,
    keep: int,
    options: dict[str, Any],
) -> LayerChange:
    """The layer with `keep` neurons in each slot; loss: the share of the scores that goes. Raises PlanError for slots that are narrow already."""
    slots, lost, total = [], 0.0, 0.0
    for slot in change.slots:
        if slot.neurons:
            raise PlanError("the plan to start from removes neurons already", fix="start from a plan that does not")
        weights = build(
            slot,
            lambda e: read_expert(checkpoint, layout, ExpertKey(change.ordinal, e)),
            layout.facts.layers[change.ordinal].spec.d_expert,
        )
        score_F = np.asarray(fn(stats.lengths("down", slot, weights), weights, **options), np.float64)
        order = np.argsort(-score_F, kind="stable")
        kept = sorted(int(f) for f in order[:keep])
        lost, total = lost + float(score_F[order[keep:]].sum()), total + float(score_F.sum())
        neurons = () if keep == len(score_F) else tuple(kept)
        slots.append(Slot(slot.sources, slot.coefficients, slot.alignments, neurons))
    return LayerChange(change.ordinal, tuple(slots), change.rows, lost / total if total else 0.0)
