"""Contribution: gate times output norm, tokens weighted by how much their residual stream turned.

Paper      Dong et al. 2025, arXiv 2504.06792 (EASY-EP)
Idea       Demonstrations of a task show which experts matter for it, if tokens on which the experts did nothing count nothing.
Rule       contribution[l, e] = sum over its tokens of max(0, 1 - cos(r_t, r_t + y_t)) * g_e(t) * |E_e(x_t)|
Needs      inputs, residual and experts
Gives      contribution_LE
Departs    in a model that scales its residual branches the scale is not applied to y
Checked    a never chosen expert has 0; a hand-computed example of two tokens; scaling an expert's output with the cosine held
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.probes.norms import lengths
from moestro.profile.probes.residual import turning
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Sum


@method(
    "profile.probes.contribution", kind="probe", fidelity="adapted", paper="2504.06792", needs=("inputs", "residual", "experts")
)
class Contribution:
    """EASY-EP's score before it is normalised."""

    gives = ("contribution_LE",)

    def start(self, setting: Setting) -> Statistics:
        return {"contribution_LE": Sum(setting.layers, setting.width)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        turned_T = np.maximum(0, 1 - turning(layer))
        for work in layer.work():
            gate_n = 1.0 if layer.facts.spec.weigh_input else np.abs(work.weights_n)
            score_n = turned_T[work.tokens_n] * gate_n * lengths(work.output_nD)
            statistics["contribution_LE"].add((layer.ordinal, work.expert), score_n.sum())
