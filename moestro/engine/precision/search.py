"""What the methods that choose bits are given, and the search they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a text showed. Shapes: L MoE layers, E experts, W widths, the fewest bits first; of layers with fewer experts the rest is 0.

    counts_LE: tokens routed to an expert. harm_LEW: what an expert does to its layer's output when it alone has that width, as
    a share of the output's square. bytes_LEW: of the expert in each width.
    """

    counts_LE: np.ndarray
    harm_LEW: np.ndarray
    bytes_LEW: np.ndarray


Judge = Callable[[np.ndarray], bool]  # widths_LE (indices into the widths) -> whether the model is within the bound


def furthest(within: Callable[[int], bool], last: int) -> int:
    """The largest step of 0..last that is within the bound, by bisection: step 0 is, and no step after one that is not."""
    low, high = 0, last + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
