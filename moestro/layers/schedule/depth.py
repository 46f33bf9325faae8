"""Depth schedules: how many experts a token may have in each MoE layer, by the layer's place u = l / (L - 1).

uniform           (least + most) / 2            pyramid-up    most in the middle: least + (most - least) (1 - |2u - 1|)
descending        from most to least            pyramid-down  least in the middle: least + (most - least) |2u - 1|
ascending         from least to most            wave          least + (most - least) (1 + sin(2 pi waves u)) / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from moestro.layers.site import require

DEPTH: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "uniform": lambda u, waves: 0.5,
        "descending": lambda u, waves: 1 - u,
        "ascending": lambda u, waves: u,
        "pyramid-up": lambda u, waves: 1 - abs(2 * u - 1),
        "pyramid-down": lambda u, waves: abs(2 * u - 1),
        "wave": lambda u, waves: (1 + math.sin(2 * math.pi * waves * u)) / 2,
    }
)


def budgets(
    schedule: str, layers: int, least: int, most: int, *, waves: float = 1.0, ceiling: int = 0, total: int = 0
) -> tuple[int, ...]:
    """Whole numbers per layer, at least 1.

    Args:
        total: their sum, if not 0: the schedule is scaled to it and rounded by largest remainders, so that schedules compare at equal cost;
            `least` and `most` then only give its shape. ceiling: the largest number allowed (0: none).

    Raises InputError for an unknown schedule or numbers that cannot be.
    """
    require(schedule in DEPTH, f"schedule {schedule!r}", "one of " + ", ".join(DEPTH))
    require(1 <= least <= most, f"from {least} to {most} experts", "at least 1, and not falling")
    places = [layer / (layers - 1) if layers > 1 else 0.0 for layer in range(layers)]
    wanted = [least + (most - least) * DEPTH[schedule](u, waves) for u in places]
    top = ceiling or max(most, total)
    if not total:
        return tuple(min(top, max(1, math.floor(value + 0.5))) for value in wanted)
    require(layers <= total <= layers * top, f"{total} experts in all for {layers} layers", f"{layers} to {layers * top}")
    scale = total / sum(wanted)
    exact = [min(top, max(1.0, value * scale)) for value in wanted]
    found = [math.floor(value) for value in exact]
    # One at a time to the layer that is furthest below what it should have, or from the one that is furthest above.
    while (step := (total > sum(found)) - (total < sum(found))) != 0:
        able = [i for i in range(layers) if 1 <= found[i] + step <= top]
        found[max(able, key=lambda i: step * (exact[i] - found[i]))] += step
    return tuple(found)
