"""Ratios: how small the weights of a token's other experts are beside its largest.

Paper      none; read by run-time skipping (arXiv 2410.06270)
Idea       A threshold on this ratio decides which experts a token can do without; its distribution says how many those are.
Rule       weight_ratios[l, j, r] = tokens with floor(-32 log2(w_j / w_1)) = r, w_j the j-th heaviest weight; the last r holds all beyond
Needs      ids and weights
Gives      weight_ratios_LKR
Departs    nothing
Checked    sums over r are the tokens that have a j-th expert; against numpy on the runner's weights; independent of the order of shards
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count

STEPS = 1024  # down to 2^-32 of the largest weight
PER_OCTAVE = 32


@method("profile.probes.ratios", kind="probe", fidelity="exact", paper="2410.06270")
class Ratios:
    """Histograms of weight ratios by rank."""

    gives = ("weight_ratios_LKR",)

    def start(self, setting: Setting) -> Statistics:
        return {"weight_ratios_LKR": Count(setting.layers, setting.slots, STEPS)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        sorted_TK = -np.sort(-np.where(layer.experts_TK >= 0, layer.weights_TK, -np.inf), axis=1)
        largest_T1 = np.maximum(sorted_TK[:, :1], 1e-30)
        for j in range(sorted_TK.shape[1]):
            there = np.isfinite(sorted_TK[:, j])
            octaves_t = -np.log2(np.clip(sorted_TK[there, j] / largest_T1[there, 0], 2.0**-40, 1))
            step_t = np.minimum((octaves_t * PER_OCTAVE).astype(np.int64), STEPS - 1)
            statistics["weight_ratios_LKR"].add((layer.ordinal, j), np.bincount(step_t, minlength=STEPS))
