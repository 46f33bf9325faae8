"""Fate: the next layer's router, asked one layer early, names the experts to fetch.

Paper      Fang, Chen, Li et al. 2025, arXiv 2502.12224
Idea       Residual updates are small beside the residual stream, so layer l's gate input is nearly layer l + 1's. Near misses
           have similar weight, so fetching a few more than k catches most errors of rank.
Rule       ranking of layer l + 1 = order of W_{l+1} x_l ; fetch the top max(k, n), n = floor(T / t_expert), T the compute time
           from gate l to the experts of l + 1, t_expert the time to read one expert; residents among them need no read
Needs      layer l's gate input and layer l + 1's router (in replay the trace's ahead_LTK)
Gives      a ranking
Departs    how many to fetch is at most a fixed count of the plan, so that replay makes the same requests, and fewer where guesses
           are often wrong (see Prefetcher). Several tokens vote with 1 / (1 + rank). The first layer, which nothing
           precedes, falls back to the previous token. Fate's INT2 copies and its split by popularity in prefill are not part
           of the predictor
Checked    with a recorded glimpse equal to the next layer's experts it is the oracle; causal
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.engine.predict.previous import Previous
from moestro.engine.prefetch import Glimpse


@method("engine.predict.gate", kind="predictor", fidelity="adapted", paper="2502.12224", needs=("ahead",))
class Gate(Previous):
    """Cross-layer gate. width: how many ranks of each token are looked at."""

    def __init__(self, layers: int, num_experts: tuple[int, ...], *, width: int = 16) -> None:
        super().__init__(layers, num_experts)
        self._num_experts, self._width = num_experts, width

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        ids_TW = None if glimpse is None else glimpse.ids(min(self._width, self._num_experts[layer]))
        if ids_TW is None:
            return super().predict(layer)
        if len(ids_TW) == 1:
            return [e for e in dict.fromkeys(ids_TW[0].tolist()) if e >= 0]
        votes_E = np.zeros(self._num_experts[layer])
        for rank in range(ids_TW.shape[1]):
            column = ids_TW[:, rank]
            np.add.at(votes_E, column[column >= 0], 1.0 / (1 + rank))
        return np.argsort(-votes_E, kind="stable")[: np.count_nonzero(votes_E)].tolist()
