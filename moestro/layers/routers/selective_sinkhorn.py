"""Selective Sinkhorn: now and then a training step routes by a balanced transport plan; all others are plain top-k.

Paper      Selective Sinkhorn Routing 2025, arXiv 2511.08972
Idea       A few balanced steps are enough to keep experts alive; a loss is not needed.
Rule       with probability q per call in training: max <Pi, C> - xi <Pi, log Pi>, Pi 1 = 1, Pi^T 1 = T / E (Sinkhorn, in logarithms);
           S = the k largest of Pi_t, g = Pi_t over its sum on S
           otherwise softmax(z + noise) (no noise in evaluation), the k largest, renormalised
Needs      nothing
Gives      a router without losses
Departs    written from secondary descriptions. Whether a gradient passes through Pi is not settled there: it does not, unless
           `differentiable`. The scale of the noise is ours. Traits batch and causal in training: the plan sees the whole batch, noise
           is drawn for each call
Checked    marginals; equal to the textbook iteration; q = 0 is top-k bit for bit; never in evaluation; large xi is uniform; the leak
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK

COSTS = ("softmax", "logits")


class Coin(Linear):
    """The gate. In training it decides whether this call is balanced, which it leaves in ctx.notes, and adds noise if not."""

    def __init__(self, site: Site, q: Scheduled, noise: float) -> None:
        super().__init__(site)
        self.q, self.noise = read(q), noise

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE = super().forward(x_TD, ctx)
        if not ctx.training or not x_TD.shape[0]:
            return logits_TE
        q = value_at(self.q, ctx.step)
        ctx.notes["balanced"] = bool(q) and float(torch.rand((), generator=ctx.rng, device=x_TD.device)) < q
        if ctx.notes["balanced"] or not self.noise:
            return logits_TE
        return logits_TE + self.noise * torch.randn(logits_TE.shape, generator=ctx.rng, device=x_TD.device)


class SometimesBalanced:
    """The normalisation: softmax, or the transport plan in a balanced call."""

    def __init__(self, cost: str, xi: float, tolerance: float, rounds: int, differentiable: bool) -> None:
        self.cost, self.xi, self.tolerance, self.rounds, self.differentiable = cost, xi, tolerance, rounds, differentiable

    def __call__(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not ctx.notes.get("balanced"):
            return logits_TE.softmax(-1)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            score_TE = logits_TE.softmax(-1) if self.cost == "softmax" else logits_TE
            return sinkhorn(score_TE, self.xi, self.tolerance, self.rounds)


def sinkhorn(score_TE: Tensor, xi: float, tolerance: float, rounds: int) -> Tensor:
    """Pi_TE: rows sum to 1, columns to T / E within `tolerance` of that, or what `rounds` iterations give."""
    tokens, experts = score_TE.shape
    kernel = score_TE / xi
    column = math.log(tokens / experts)
    row_T1 = torch.zeros_like(kernel[:, :1])
    for _ in range(rounds):
        column_1E = column - (kernel + row_T1).logsumexp(0, keepdim=True)
        row_T1 = -(kernel + column_1E).logsumexp(1, keepdim=True)
        plan = (kernel + column_1E + row_T1).exp()
        if float((plan.detach().sum(0) * experts / tokens - 1).abs().max()) < tolerance:
            break
    return plan


@method(
    "layers.routers.selective_sinkhorn",
    kind="router",
    fidelity="adapted",
    paper="2511.08972",
    traits=("batch-in-training", "causal-in-training"),
)
def selective_sinkhorn(
    site: Site,
    *,
    q: Scheduled = 0.01,
    cost: str = "softmax",
    xi: float = 0.05,
    tolerance: float = 1e-4,
    rounds: int = 100,
    noise: float = 0.1,
    differentiable: bool = False,
) -> StagedRouter:
    """q: share of balanced calls; runs of a few thousand steps need about 0.05. cost: 'softmax', or 'logits' with xi near 1."""
    require(cost in COSTS, f"cost {cost!r}", " or ".join(COSTS))
    require(xi > 0 and rounds >= 1 and noise >= 0, f"xi {xi}, {rounds} rounds, noise {noise}", "above 0, at least 1, at least 0")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Coin(site, q, noise),
        normalise=SometimesBalanced(cost, xi, tolerance, rounds, differentiable),
        select=TopK(site.top_k),
        combine=Combine("renormalised"),
    )
