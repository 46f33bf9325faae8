"""Sinks: how much of their attention tokens leave at the first one.

Paper      Gu et al. 2024, arXiv 2410.10781
Idea       Heads with nothing to say attend to the first token, whose value adds little; large outputs of single experts put it there.
Rule       A_h(t, 0) = weight that head h gives the sequence's first token at token t > 0; sink = sum over t of its mean over heads;
           alpha_h = mean over a sequence's t of A_h(t, 0), counted in 20 bins of 0.05
Needs      attention
Gives      sink_L, even_sink_L (what attending evenly would give: sum of 1 / (t + 1)), sinking_L (tokens), sinks_LB (bins; heads x sequences)
Departs    the first token, whose weight on itself is 1, is not counted; layers without a router are not seen
Checked    queries of zero give even attention; a key planted at the first token takes all; the module's own attention weights
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum

BINS = 20


@method("profile.probes.sinks", kind="probe", fidelity="adapted", paper="2410.10781", needs=("attention",))
class Sinks:
    """Sums over tokens of the attention to the first one, and how it spreads over heads."""

    gives = ("sink_L", "even_sink_L", "sinking_L", "sinks_LB")

    def start(self, setting: Setting) -> Statistics:
        sums = {name: Sum(setting.layers) for name in ("sink_L", "even_sink_L")}
        return {**sums, "sinking_L": Count(setting.layers), "sinks_LB": Count(setting.layers, BINS)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        later_T = layer.rows_T > 0
        if layer.sink_TH is None or not later_T.any():
            return
        sink_TH = layer.sink_TH[later_T].astype(np.float64)
        statistics["sink_L"].add(layer.ordinal, sink_TH.mean(1).sum())
        statistics["even_sink_L"].add(layer.ordinal, (1 / (layer.rows_T[later_T] + 1)).sum())
        statistics["sinking_L"].add(layer.ordinal, len(sink_TH))
        bins_H = np.minimum((sink_TH.mean(0) * BINS + 1e-9).astype(int), BINS - 1)
        statistics["sinks_LB"].add(layer.ordinal, np.bincount(bins_H, minlength=BINS))
