"""GShard top-2: two experts per token, the second one only as often as its weight says.

Paper      Lepikhin et al. 2020, arXiv 2006.16668
Idea       The better expert always runs; a second expert with a small weight is not worth a place in its buffer.
Rule       p = softmax(x W^T); e1, e2 = the two largest; g1 = p1 / (p1 + p2), g2 = p2 / (p1 + p2)
           training: the second is kept when 2 g2 > u, u ~ U(0, 1); C = ceil(factor 2 T / E), all first choices before any second
           loss = weight E sum_e f_e P_e, f of the first choices only
Needs      nothing; top_k of the configuration is not read: it is 2
Gives      a router with balance loss and capacity
Departs    a group of tokens is the batch of a process; evaluation keeps both choices and drops nothing (evaluate_capacity sets a limit,
           and then later tokens compete with earlier ones). gumbel and renormalise are options of fairscale's gate. Traits batch and causal
           in training: tokens compete for places, and a later first choice goes before an earlier second one
Checked    without randomness and limits: the dense softmax masked to two and renormalised; how often the second stays, by Monte Carlo
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing, Tap
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, softmax
from moestro.layers.taps.capacity import Capacity


class TopTwo:
    """The best expert, then the best of the others; with `gumbel` the second is drawn in proportion to its probability."""

    def __init__(self, gumbel: bool) -> None:
        self.gumbel = gumbel

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        first_T1 = scores_TE.argmax(-1, keepdim=True)
        others_TE = scores_TE.scatter(1, first_T1, float("-inf"))
        if self.gumbel and ctx.training:
            noise = torch.empty_like(scores_TE).exponential_(generator=ctx.rng).log().neg()
            others_TE = torch.where(others_TE.isneginf(), others_TE, others_TE.clamp_min(1e-30).log() + noise)
        return torch.cat((first_T1, others_TE.argmax(-1, keepdim=True)), -1)


class RandomSecond:
    """Drops the second choice with probability 1 - 2 g2, in training."""

    def __init__(self, renormalise: bool) -> None:
        self.renormalise = renormalise

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        if not ctx.training:
            return routing
        weights = routing.weights_TK.detach()
        drawn = torch.rand(weights.shape[0], generator=ctx.rng, device=weights.device)
        mask = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        mask[:, 1] = 2 * weights[:, 1] <= drawn
        return routing.drop(mask, renormalise=self.renormalise)


@method(
    "layers.routers.gshard",
    kind="router",
    fidelity="faithful",
    paper="2006.16668",
    traits=("batch-in-training", "causal-in-training"),
)
def gshard(
    site: Site,
    *,
    capacity: float = 1.0,
    evaluate_capacity: float = 0.0,
    random_second: bool = True,
    gumbel: bool = False,
    renormalise: bool = False,
    balance: Scheduled = 0.01,
) -> StagedRouter:
    """capacity, evaluate_capacity: factors, 0 drops nothing. renormalise: what is left after drops weighs as much as both did."""
    require(site.num_experts >= 2, f"{site.num_experts} expert", "at least 2 for a second choice")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopTwo(gumbel),
        combine=Combine("renormalised"),
        taps=[
            *([Tap("routing", RandomSecond(renormalise))] if random_second else []),
            Capacity(site, capacity, evaluate_capacity, renormalise=renormalise),
        ],
        losses={"balance": Balance(site, balance, first_slot=True)},
    )
