"""Uniform: every layer gets the same number of slots.

Paper      none
Idea       The baseline of dividing slots among layers.
Rule       slots_l = capacity / L, between the layer's top-k and its number of experts; what a full layer cannot take goes to others
Needs      nothing
Gives      slots per layer
Departs    nothing
Checked    sums to the capacity; layers differ by one at most unless a bound holds them
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.method import method
from moestro.engine.allocate.share import share


@method("engine.allocate.uniform", kind="allocation", fidelity="exact")
def uniform(capacity: int, num_experts: Sequence[int], top_k: Sequence[int]) -> tuple[int, ...]:
    """slots_L. Raises BudgetError when capacity < sum(top_k)."""
    return share(capacity, np.ones(len(num_experts)), top_k, num_experts)
