"""Entropy and margin: how sure the router is.

Paper      none
Idea       A router that hardly tells its K-th choice from the next one can be changed there at little cost.
Rule       entropy = -sum_e p_e log p_e of p = softmax(logits), in nats; margin = K-th largest logit - (K + 1)-th; log_sum_exp of the logits
Needs      router logits
Gives      entropy_L and margin_L (sums over routed_L tokens), margins_LB (histogram, 16 bins of 0.25), log_sum_exp_L
Departs    nothing; sigmoid and other routers are read through the softmax of their logits too, so that models compare
Checked    uniform logits give log E and margin 0; numpy on drawn logits
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum

BINS, WIDTH = 16, 0.25


@method("profile.probes.entropy", kind="probe", fidelity="exact", needs=("logits",))
class Entropy:
    """Sums over tokens of the router's entropy, margin and log-partition."""

    gives = ("entropy_L", "margin_L", "margins_LB", "log_sum_exp_L", "routed_L")

    def start(self, setting: Setting) -> Statistics:
        sums = {name: Sum(setting.layers) for name in ("entropy_L", "margin_L", "log_sum_exp_L")}
        return {**sums, "margins_LB": Count(setting.layers, BINS), "routed_L": Count(setting.layers)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        logits_TE = layer.logits_TE.astype(np.float64)
        top_T1 = logits_TE.max(1, keepdims=True)
        exp_TE = np.exp(logits_TE - top_T1)
        sum_T = exp_TE.sum(1)
        lse_T = np.log(sum_T) + top_T1[:, 0]
        entropy_T = lse_T - np.einsum("te,te->t", exp_TE, np.where(exp_TE > 0, logits_TE, 0)) / sum_T
        statistics["entropy_L"].add(layer.ordinal, entropy_T.sum())
        statistics["log_sum_exp_L"].add(layer.ordinal, lse_T.sum())
        statistics["routed_L"].add(layer.ordinal, len(logits_TE))
        k = layer.facts.top_k
        if k < logits_TE.shape[1]:
            experts = logits_TE.shape[1]
            sorted_TE = np.partition(layer.logits_TE, (experts - k - 1, experts - k), axis=1)
            margin_T = sorted_TE[:, experts - k].astype(np.float64) - sorted_TE[:, experts - k - 1]
            statistics["margin_L"].add(layer.ordinal, margin_T.sum())
            bins = np.bincount(np.minimum((margin_T / WIDTH).astype(int), BINS - 1), minlength=BINS)
            statistics["margins_LB"].add(layer.ordinal, bins)
