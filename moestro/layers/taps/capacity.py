"""Capacity: an expert takes a bounded number of tokens; the rest are dropped.

Paper      Lepikhin et al. 2020, arXiv 2006.16668; Fedus, Zoph, Shazeer 2021, arXiv 2101.03961
Idea       Fixed buffers make the work of every expert the same.
Rule       C = ceil(factor * T * K / E); a pair is dropped when C pairs of its expert come before it
           order 'slot': all first choices come before any second choice; 'token': a token's choices come together
Needs      nothing
Gives      a routing with empty slots where pairs were dropped
Departs    from nothing. Trait batch: tokens of a batch compete for places. Trait causal: with order 'slot' a later token's first
           choice takes the place of an earlier token's second; order 'token' is causal
Checked    processed + dropped = pairs, no expert above C, factor E / K drops nothing
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.site import Site, require


class Capacity(nn.Module):
    """The tap. train, evaluate: the capacity factors; 0 drops nothing. renormalise: a token keeps its sum of weights."""

    point = "routing"

    def __init__(self, site: Site, train: float, evaluate: float, *, order: str = "slot", renormalise: bool = False) -> None:
        super().__init__()
        require(order in ("slot", "token"), f"order {order!r}", "slot or token")
        require(train >= 0 and evaluate >= 0, f"capacity factors {train} and {evaluate}", "at least 0")
        self.experts, self.train_factor, self.evaluate_factor = site.num_experts, train, evaluate
        self.order, self.renormalise = order, renormalise

    def limit(self, routing: Routing, training: bool) -> int:
        """C for this many tokens; -1: no limit."""
        factor = self.train_factor if training else self.evaluate_factor
        return math.ceil(factor * routing.tokens * routing.slots / self.experts) if factor else -1

    def forward(self, routing: Routing, ctx: RouteContext) -> Routing:
        limit = self.limit(routing, ctx.training)
        if limit < 0:
            return routing
        return routing.drop(rank(routing.experts_TK, self.experts, self.order) >= limit, renormalise=self.renormalise)


def rank(experts_TK: Tensor, num_experts: int, order: str = "slot") -> Tensor:
    """rank_TK: how many pairs of the same expert come before each pair; -1 in empty slots."""
    ids = experts_TK.t() if order == "slot" else experts_TK
    flat = ids.reshape(-1)
    by_expert = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    first = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[by_expert] = torch.arange(flat.numel(), device=flat.device)
    ranks = torch.where(flat < 0, -1, place - first[flat + 1]).view(ids.shape)
    return ranks.t() if order == "slot" else ranks


@method("layers.taps.capacity", kind="tap", fidelity="exact", paper="2101.03961", traits=("batch", "causal"))
def capacity(
    site: Site, *, train: float = 1.25, evaluate: float = 2.0, order: str = "slot", renormalise: bool = False
) -> Capacity:
    """Capacity factors in training and in evaluation; 0 is no limit."""
    return Capacity(site, train, evaluate, order=order, renormalise=renormalise)
