"""What methods of kind 'skip' decide: the taps that a model's layers get, and what share of the routed pairs they will drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.errors import PlanError
from moestro.core.layer import LayerFacts
from moestro.core.plans.compression import CompressionPlan, TapUse
from moestro.profile.probes.ratios import PER_OCTAVE

Skips = list[tuple[TapUse, float | None]]  # of each layer the tap, and the share of its routed pairs that goes


def with_taps(
    fn: Any, plan: CompressionPlan, stats: Sequence[LayerStats], layers: Sequence[LayerFacts], options: dict[str, Any]
) -> CompressionPlan:
    """The plan with one more tap in each layer. Raises PlanError when its layers have taps already."""
    if any(la.taps for la in plan.layers):
        raise PlanError("the plan to start from skips experts already", fix="start from the plan before it")
    made: Skips = fn(stats, layers, **options)
    changes = tuple(
        replace(la, taps=(tap,), loss=la.loss if share is None else share)
        for la, (tap, share) in zip(plan.layers, made, strict=True)
    )
    known = all(share is not None for _, share in made)
    changed = any(len(la.slots) < facts.num_experts or la.rows for la, facts in zip(plan.layers, layers, strict=True))
    if changed and stats:
        text = "what is skipped was decided by the original's routing, not by that of the smaller model"
        plan = replace(plan, stated=(*plan.stated, text))
    return replace(plan, layers=changes, loss_unit="share of the routed experts skipped" if known else plan.loss_unit)


def renormalised(facts: LayerFacts) -> bool:
    """Whether the weights of a token's experts have a sum of their own, which then stays when some are skipped."""
    return facts.router.renormalised or facts.router.weights.endswith("_after")


def ratios(stats: LayerStats) -> np.ndarray:
    """counts_KR of the probe `ratios` without the largest weights' own."""
    return stats.need("ratios", "weight_ratios_LKR")[1:]


def below(ratios_KR: np.ndarray, threshold: float) -> float:
    """The share of a layer's pairs, the largest of each token included, whose ratio is below the threshold."""
    tokens = ratios_KR[0].sum() if len(ratios_KR) else 0
    pairs = tokens + ratios_KR.sum()
    if not pairs or threshold <= 0:
        return 0.0
    first = math.ceil(-math.log2(threshold) * PER_OCTAVE - 1e-6)
    return float(ratios_KR[:, first:].sum() / pairs)
