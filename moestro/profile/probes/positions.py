"""Positions: which experts each place in a document is routed to.

Paper      Xue et al. 2024, arXiv 2402.01739 (OpenMoE): position decides little
Idea       The control for routing by token id, and a way to see experts that only look after the first tokens.
Rule       by_position[p, l, e] = tokens at position p whose slots hold e; the last row takes all later positions
Needs      ids
Gives      by_position_PLE, position_tokens_P
Departs    nothing
Checked    sums over positions to the counts
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count


@method("profile.probes.positions", kind="probe", fidelity="faithful", paper="2402.01739")
class Positions:
    """Counts per position. most: how many positions are told apart."""

    gives = ("by_position_PLE", "position_tokens_P")

    def __init__(self, *, most: int = 1024) -> None:
        self.most = most

    def start(self, setting: Setting) -> Statistics:
        rows = self.most
        counts = Count(rows, setting.layers, setting.width, dtype=np.int32)
        return {"by_position_PLE": counts, "position_tokens_P": Count(rows)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        row_T = np.minimum(seen.positions_T, self.most - 1)
        if layer.ordinal == 0:
            statistics["position_tokens_P"].add(slice(None), np.bincount(row_T, minlength=self.most))
        first, last = int(row_T[0]), int(row_T[-1]) + 1  # positions of a sequence ascend
        place = ((row_T - first)[:, None] * layer.width + layer.experts_TK)[layer.experts_TK >= 0]
        found = np.bincount(place, minlength=(last - first) * layer.width).reshape(-1, layer.width)
        statistics["by_position_PLE"].add((slice(first, last), layer.ordinal), found)
