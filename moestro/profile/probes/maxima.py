"""Maxima: the largest activation of each expert, at its input, inside, and at its output.

Paper      Su et al. 2025, arXiv 2507.23279 (Super Experts) for the output
Idea       A few experts emit extreme values that create massive activations and attention sinks; quantisers need ranges.
Rule       output_most[l, e] = max over tokens and channels of |E_e(x)| before the weight; input_most[l, d], hidden_most[l, e, f] likewise
Needs      inputs and experts
Gives      output_most_LE, input_most_LD, hidden_most_LEF
Departs    nothing
Checked    an expert whose last projection is scaled by 50 shows 50 times its maximum
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Most


@method("profile.probes.maxima", kind="probe", fidelity="exact", paper="2507.23279", needs=("inputs", "experts"))
class Maxima:
    """Largest absolute values."""

    gives = ("output_most_LE", "input_most_LD", "hidden_most_LEF")

    def start(self, setting: Setting) -> Statistics:
        la, e = setting.layers, setting.width
        return {
            "output_most_LE": Most(la, e),
            "input_most_LD": Most(la, setting.d_model),
            "hidden_most_LEF": Most(la, e, setting.d_expert),
        }

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        statistics["input_most_LD"].add(layer.ordinal, np.abs(layer.x_TD).max(0))
        for work in layer.work():
            at = (layer.ordinal, work.expert)
            statistics["output_most_LE"].add(at, np.abs(work.output_nD).max())
            inner = work.hidden_nF.shape[1]
            statistics["hidden_most_LEF"].add((*at, slice(inner)), np.abs(work.hidden_nF).max(0))
