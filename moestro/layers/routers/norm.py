"""NormRouter: gates are the positive part of logits of unit length.

Paper      UniPool, 2026, arXiv 2605.06665
Idea       Routers that share one pool of experts must weigh alike: only the direction of the logits counts, not their length.
Rule       z = x W^T; s = alpha c relu(z / (|z| + 1e-8)); the k largest s, weights s, neither softmax nor renormalisation; alpha is learned
           c = 1 / sqrt(E[sum of the k largest relu(u / |u|)^2]), u ~ N(0, I_E), by 100,000 draws: the weights' squares sum to about 1
Needs      nothing; meant for the architecture `unipool` with the loss `pool`
Gives      a router without losses
Departs    The paper's c is E[1 / sqrt(...)], 3 % more at 64 experts and without a limit for few, where all logits but one may be
           negative. alpha is exp of what is learned, so that it stays positive. A score of 0 takes no slot: its expert would add
           nothing. allocated > 0 is the paper's allocation without its learning: layer l sees the experts l a .. l a + a - 1 only, the
           others' logits are 0 before the norm and never chosen. That a later revision learns this and locks it is not built
Checked    scaling the logits changes nothing; c by its definition; disjoint allocations are layers of their own experts
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK


@functools.cache
def unit_scale(experts: int, k: int, draws: int = 100_000) -> float:
    """c: what makes the squares of the k largest weights sum to 1 on average."""
    rng, total = torch.Generator().manual_seed(0), 0.0
    for first in range(0, draws, 10_000):
        u = torch.randn(min(10_000, draws - first), experts, generator=rng)
        total += float((u / u.norm(dim=1, keepdim=True)).relu().topk(k, 1).values.square().sum())
    return (draws / total) ** 0.5


class UnitRelu(nn.Module):
    """The normalisation: alpha c relu(z / |z|), of the allowed experts only."""

    allowed_E: Tensor

    def __init__(self, site: Site, allocated: int) -> None:
        super().__init__()
        e, a = site.num_experts, allocated or site.num_experts
        require(
            a * (site.layers if allocated else 1) <= e, f"{a} of {e} experts for each of {site.layers} layers", "enough experts"
        )
        require(site.top_k <= a, f"top_k {site.top_k} of {a} experts", "no more slots than experts")
        allowed = torch.zeros(e, dtype=torch.bool)
        first = site.layer * allocated
        allowed[first : first + a] = True
        self.register_buffer("allowed_E", allowed)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.c = unit_scale(a, site.top_k)

    def forward(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE = logits_TE * self.allowed_E
        return self.log_alpha.exp() * self.c * (logits_TE / (logits_TE.norm(dim=1, keepdim=True) + 1e-8)).relu()


class Positive(TopK):
    """The k largest scores, those above 0."""

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        experts_TK = super().__call__(scores_TE, ctx)
        return experts_TK.masked_fill(scores_TE.gather(1, experts_TK) <= 0, -1)


@method("layers.routers.norm", kind="router", fidelity="adapted", paper="2605.06665")
def norm(site: Site, *, allocated: int = 0) -> StagedRouter:
    """allocated: experts of the pool that each layer may use, 0 for all."""
    return StagedRouter(
        score=Linear(site), normalise=UnitRelu(site, allocated), select=Positive(site.top_k), combine=Combine("raw")
    )
