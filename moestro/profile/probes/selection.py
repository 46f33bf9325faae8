"""Selection: the router's logits of the experts it likes best, as a task's pattern.

Paper      Zhu et al. 2025, arXiv 2505.17639 (PreMoe's task-conditioned selection score)
Idea       How strongly the router wants an expert, where it wants it at all, tells which task it serves.
Rule       selected_logits[l, e] = sum over tokens of s_e, s_e = z_e if e is among the `first` highest logits of the token, else 0; with a
           threshold s_e = softmax over those of the first with z_e >= threshold. selected_positive = the same sum of max(s_e, 0)
Needs      the router's logits
Gives      selected_logits_LE, selected_positive_LE
Departs    nothing; sums, not means: divide by the tokens. first = 1 is the authors' demonstration
Checked    against numpy on the runner's logits; independent of the order of shards
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Sum


@method("profile.probes.selection", kind="probe", fidelity="exact", paper="2505.17639", needs=("logits",))
class Selection:
    """Sums of masked logits. first: how many of each token count. threshold: least logit that counts, None for no softmax."""

    gives = ("selected_logits_LE", "selected_positive_LE")

    def __init__(self, *, first: int = 1, threshold: float | None = None) -> None:
        if first < 1:
            raise InputError(f"first is {first}", expected="at least 1")
        self.first, self.threshold = first, threshold

    def start(self, setting: Setting) -> Statistics:
        return {name: Sum(setting.layers, setting.width) for name in self.gives}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        logits_TE, experts = layer.logits_TE, layer.logits_TE.shape[1]
        if self.first == 1:
            first_TA = logits_TE.argmax(1)[:, None]
        else:
            first_TA = np.argsort(-logits_TE, axis=1, kind="stable")[:, : self.first]
        value_TA = np.take_along_axis(logits_TE, first_TA, axis=1).astype(np.float64)
        if self.threshold is not None:
            over_TA = np.where(value_TA >= self.threshold, value_TA, -np.inf)
            exp_TA = np.exp(over_TA - np.maximum(over_TA.max(1, keepdims=True), self.threshold))
            value_TA = exp_TA / np.maximum(exp_TA.sum(1, keepdims=True), 1e-300)
        at = (layer.ordinal, slice(experts))
        for name, values_TA in zip(self.gives, (value_TA, np.maximum(value_TA, 0)), strict=True):
            statistics[name].add(at, np.bincount(first_TA.reshape(-1), values_TA.reshape(-1), experts))
