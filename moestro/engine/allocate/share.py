"""Divide a number of slots among layers in proportion to weights, within bounds, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.errors import BudgetError


def share(capacity: int, weights_L: np.ndarray, low_L: Sequence[int], high_L: Sequence[int]) -> tuple[int, ...]:
    """slots_L with low <= slots <= high that sum to min(capacity, sum(high)), as near proportion to the weights as that allows.

    weights_L: not negative. Raises BudgetError when capacity < sum(low).
    """
    low, high = np.asarray(low_L, np.int64), np.asarray(high_L, np.int64)
    if capacity < low.sum():
        raise BudgetError(
            f"{capacity} expert slots", smallest=int(low.sum()), expected=f"at least {int(low.sum())}: each layer's top-k"
        )
    total = int(min(capacity, high.sum()))
    weights = np.maximum(np.asarray(weights_L, np.float64), 1e-9)
    least, most = 0.0, float((high / weights).max()) + 1
    for _ in range(200):  # the scale at which clipped shares sum to the total
        middle = (least + most) / 2
        least, most = (middle, most) if np.clip(middle * weights, low, high).sum() < total else (least, middle)
    ideal = np.clip(least * weights, low, high)
    slots = np.floor(ideal + 1e-9).astype(np.int64)
    while (rest := total - int(slots.sum())) > 0:
        order = np.argsort(-np.where(slots < high, ideal - slots, -np.inf), kind="stable")
        open_layers = int((slots < high).sum())
        slots[order[: min(rest, open_layers)]] += 1
    return tuple(int(n) for n in slots)
