"""Learned mask: a small network says how many of a token's chosen experts run, the heaviest first.

Paper      Huang et al. 2025, MC#, arXiv 2510.10962 (online top-any pruning)
Idea       Which tokens need all their experts can be learned; nested candidates keep the choice small.
Rule       candidates C_j: the j heaviest run, j = 1..K; pi = W2 relu(W1 [x / rms(x), sorted weights] + b1) + b2; j = argmax pi + 1
Needs      the network's weights, trained by train.tuning.otp; the layer's input
Gives      a routing with empty slots where pairs were dropped; torch or numpy, as it comes
Departs    the paper's candidates and the network's shape are not published in what could be read: nested ones and one hidden layer
Checked    masks are nested and keep the heaviest; numpy and torch agree; what training chose without noise is what runs
"""

from __future__ import annotations

from collections.abc import Mapping

from moestro.core.method import method
from moestro.core.routing import Array, RouteContext, Routing, namespace
from moestro.layers.taps.first import rank

NAMES = ("w1", "b1", "w2", "b2")  # [D + K, H], [H], [H, K], [K]


class LearnedMask:
    """The tap. arrays: by NAMES, numpy. renormalise: a token keeps its sum of weights."""

    point = "routing"

    def __init__(self, arrays: Mapping[str, Array], renormalise: bool) -> None:
        self.arrays, self.renormalise = arrays, renormalise

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        assert ctx.x_TD is not None, "runners give taps the layer's input"
        xp = namespace(routing.weights_TK)
        arrays = {name: xp.asarray(self.arrays[name]) for name in NAMES}
        rank_TK = rank(routing)
        x_TD = ctx.x_TD if xp.__name__ == "numpy" else ctx.x_TD.float()
        number_T = scores(x_TD, ordered(routing.weights_TK, rank_TK), arrays).argmax(-1) + 1
        return routing.drop(rank_TK >= number_T[:, None], renormalise=self.renormalise)


def ordered(weights_TK: Array, rank_TK: Array) -> Array:
    """weights_TK, the heaviest first."""
    slot_K = namespace(weights_TK).arange(weights_TK.shape[1])
    return (weights_TK[:, :, None] * (rank_TK[:, :, None] == slot_K)).sum(1)


def scores(x_TD: Array, sorted_TK: Array, arrays: Mapping[str, Array]) -> Array:
    """pi_TK, one for each number of experts that may run."""
    xp = namespace(x_TD)
    scaled_TD = x_TD / xp.sqrt((x_TD * x_TD).mean(-1)[:, None] + 1e-6)
    hidden_TH = xp.concatenate([scaled_TD, sorted_TK], -1) @ arrays["w1"] + arrays["b1"]
    return (hidden_TH * (hidden_TH > 0)) @ arrays["w2"] + arrays["b2"]


@method("layers.taps.learned_mask", kind="learned tap", fidelity="adapted", paper="2510.10962")
def learned_mask(arrays: Mapping[str, Array], *, renormalise: bool = False) -> LearnedMask:
    """arrays: what was trained."""
    return LearnedMask(arrays, renormalise)
