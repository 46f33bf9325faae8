"""Gates: how much weight each expert gets, and at which rank among the chosen.

Paper      none
Idea       An expert that is chosen often but always last with a small weight matters less than its count says.
Rule       mass[l, e] = sum of combine weights; squares[l, e] = sum of their squares; ranks[l, j, e] = times e was the j-th heaviest;
           rank_mass[l, j] = sum of the j-th heaviest weights
Needs      ids and weights
Gives      mass_LE, squares_LE, ranks_LKE, rank_mass_LK
Departs    nothing
Checked    ranks sum to the counts; mass against numpy on the runner's weights; independent of the order of shards
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.gates", kind="probe", fidelity="exact")
class Gates:
    """Weights and ranks per expert."""

    gives = ("mass_LE", "squares_LE", "ranks_LKE", "rank_mass_LK")

    def start(self, setting: Setting) -> Statistics:
        la, e, k = setting.layers, setting.width, setting.slots
        return {"mass_LE": Sum(la, e), "squares_LE": Sum(la, e), "ranks_LKE": Count(la, k, e), "rank_mass_LK": Sum(la, k)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        flat, weight = layer.experts_TK.reshape(-1), layer.weights_TK.reshape(-1)
        kept = flat >= 0
        flat, weight = flat[kept], weight[kept]
        statistics["mass_LE"].add(layer.ordinal, np.bincount(flat, weight, layer.width))
        statistics["squares_LE"].add(layer.ordinal, np.bincount(flat, weight * weight, layer.width))
        ranked_TK = layer.ranked_TK
        slots = ranked_TK.shape[1]
        place = (np.arange(slots) * layer.width + ranked_TK)[ranked_TK >= 0]
        counts = np.bincount(place, minlength=slots * layer.width).reshape(slots, layer.width)
        statistics["ranks_LKE"].add((layer.ordinal, slice(slots)), counts)
        sums_K = np.where(ranked_TK >= 0, np.take_along_axis(layer.weights_TK, layer.order_TK, axis=1), 0).sum(0)
        statistics["rank_mass_LK"].add((layer.ordinal, slice(slots)), sums_K)
