"""Weight ratio: a chosen expert whose weight is small beside the token's largest is skipped, but not for the tokens that matter most.

Paper      Huang et al. 2024, MC-MoE, arXiv 2410.06270 (online dynamic pruning)
Idea       Where the router is sure of one expert, the others change little; where it is not, all are needed.
Rule       pair (t, j) is dropped when w_j < threshold * max_i w_i; of the tokens of one pass the share `protect` with the largest
           |x_t|_1 keep all, when the pass has more than one token
Needs      nothing; with protect > 0 the layer's input
Gives      a routing with empty slots where pairs were dropped; torch or numpy, as it comes
Departs    a token's significance is |x_t|_1 alone: how much attention it gets, by which the paper multiplies it, is not known where
           experts are called. Traits batch and causal: with protect > 0 the tokens of a pass compete for protection
Checked    threshold 0 changes nothing, 1 leaves the largest alone; what is kept shrinks as the threshold grows; numpy and torch agree
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import Array, RouteContext, Routing, namespace

if TYPE_CHECKING:
    from moestro.layers.site import Site


class WeightRatio:
    """The tap. renormalise: a token keeps its sum of weights."""

    point = "routing"

    def __init__(self, threshold: float, protect: float, renormalise: bool) -> None:
        if not 0 <= threshold <= 1 or not 0 <= protect <= 1:
            raise InputError(f"threshold {threshold:g}, protect {protect:g}", expected="shares from 0 to 1")
        self.threshold, self.protect, self.renormalise = threshold, protect, renormalise

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        xp = namespace(routing.weights_TK)
        mask_TK = routing.weights_TK < self.threshold * xp.amax(routing.weights_TK, -1)[:, None]
        if self.protect and ctx.x_TD is not None and routing.tokens > 1:
            mask_TK = mask_TK & ~significant(ctx.x_TD, math.ceil(self.protect * routing.tokens))[:, None]
        return routing.drop(mask_TK, renormalise=self.renormalise)


def significant(x_TD: Array, number: int) -> Array:
    """bool_T: the `number` tokens with the largest |x_t|_1, ties to the earlier."""
    xp = namespace(x_TD)
    size_T = xp.abs(x_TD).sum(-1)
    order = xp.argsort(-size_T, kind="stable") if xp.__name__ == "numpy" else xp.argsort(-size_T, stable=True)
    found_T = xp.zeros_like(size_T, dtype=xp.bool_ if xp.__name__ == "numpy" else xp.bool)
    found_T[order[:number]] = True
    return found_T


@method("layers.taps.weight_ratio", kind="tap", fidelity="adapted", paper="2410.06270", traits=("batch", "causal"))
def weight_ratio(site: Site | None, *, threshold: float = 0.3, protect: float = 0.02, renormalise: bool = False) -> WeightRatio:
    """In training and in evaluation alike."""
    return WeightRatio(threshold, protect, renormalise)
