"""Fate: the first layers keep all their experts, the others share the rest.

Paper      Fang, Chen, Li et al. 2025, arXiv 2502.12224
Idea       A predictor that looks one layer ahead is worst in the first layers, so these should not need it.
Rule       slots_l = E for l < boundary, the rest in equal parts
Needs      nothing
Gives      slots per layer
Departs    the boundary is an option (the paper finds it from per-layer prediction accuracy; 3 on Qwen1.5-MoE). When the
           capacity cannot fill the first layers and give all others their top-k, the first layers are filled in order as far as it goes
Checked    sums to the capacity; layers below the boundary never miss after warm-up
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.method import method
from moestro.engine.allocate.share import share


@method("engine.allocate.shallow", kind="allocation", fidelity="adapted", paper="2502.12224")
def shallow(capacity: int, num_experts: Sequence[int], top_k: Sequence[int], *, boundary: int = 3) -> tuple[int, ...]:
    """slots_L; boundary: how many of the first layers are kept whole. Raises BudgetError when capacity < sum(top_k)."""
    low = list(top_k)
    spare = capacity - sum(low)
    for layer in range(min(boundary, len(low))):
        more = min(max(0, spare), num_experts[layer] - low[layer])
        low[layer] += more
        spare -= more
    return share(capacity, np.ones(len(low)), low, num_experts)
