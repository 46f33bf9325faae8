"""ExpertFlow: layers get slots in proportion to how many different experts they use in a while.

Paper      He, Zhang, Wang et al. 2024, arXiv 2410.17954
Idea       A layer whose routing wanders needs more slots than one that stays with a few experts.
Rule       slots_l = capacity * demand_l / sum(demand), between the layer's top-k and its number of experts
Needs      demand_L, for instance `working_set` of a trace
Gives      slots per layer
Departs    the paper's demand comes from its trained path predictor and is renewed while running; here it is measured once on a
           trace, as the mean number of distinct experts in windows of consecutive decode passes
Checked    sums to the capacity; proportional where no bound holds; a layer with constant routing gets its top-k
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.method import method
from moestro.core.trace import Trace
from moestro.engine.allocate.share import share


@method("engine.allocate.demand", kind="allocation", fidelity="adapted", paper="2410.17954", needs=("demand",))
def demand(capacity: int, num_experts: Sequence[int], top_k: Sequence[int], demand_L: np.ndarray) -> tuple[int, ...]:
    """slots_L. Raises BudgetError when capacity < sum(top_k)."""
    return share(capacity, demand_L, top_k, num_experts)


def working_set(trace: Trace, window: int = 16) -> np.ndarray:
    """demand_L: mean number of distinct experts that `window` consecutive tokens use, of decoded ones if there are any.

    Windows do not overlap and are at most as long as the trace.
    """
    rows = np.flatnonzero(np.asarray(trace.prefill_T) == 0)
    if not len(rows):
        rows = np.arange(trace.tokens)
    window = max(1, min(window, len(rows)))
    blocks = rows[: len(rows) // window * window].reshape(-1, window)
    out_L = np.zeros(trace.layers)
    for layer in range(trace.layers):
        ids_TK = np.asarray(trace.experts_LTK[layer])
        out_L[layer] = np.mean([len(np.unique(used[used >= 0])) for used in (ids_TK[block] for block in blocks)] or [0.0])
    return out_L
