"""DynaMoE: a threshold on the logits decides how many experts a token gets, a schedule over depth how many it may get.

Paper      DynaMoE 2026, arXiv 2603.01697
Idea       Capacity where it is needed: by token through the threshold, by layer through the budget K_l.
Rule       z = x W^T + b; theta = the tau-percentile of the layer's logits; S_t = {e : z_te >= theta}, at least the best, at most the K_l best;
           g = softmax over the chosen logits; loss = weight E sum_e f_e P_e
Needs      the layer's place; the steps' logits (controller)
Gives      a router with balance loss; theta is a saved buffer
Departs    written from summaries of the paper. The percentile is over all logits of the layer, a running mean over training steps
           (starting at 0, the median of fresh logits): a percentile of a token's own E logits, percentile_of 'token', keeps the same number
           for every token. The schedules' functions, the weight of the loss and the numbers of experts are inferred; most 0
           means 2 top_k. least is not 1, as a softmax over one expert gives the router of such a layer no gradient
Checked    1 <= |S_t| <= K_l; counts differ between tokens, and do not with percentile_of 'token'; ends and totals of the schedules
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import Output
from moestro.layers.losses.balance import Balance
from moestro.layers.reduce import sum_over_ranks
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.schedule.depth import budgets
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, where

SOURCES = ("layer", "token")


def noted_softmax(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    """Softmax; leaves the logits for the threshold."""
    ctx.notes["logits_TE"] = logits_TE.detach()
    return logits_TE.softmax(-1)


class Threshold(nn.Module):
    """The selection, and the controller that keeps the percentile."""

    theta: Tensor
    seen: Tensor

    def __init__(self, most: int, percentile: float, source: str, decay: float) -> None:
        super().__init__()
        self.most, self.percentile, self.source, self.decay = most, percentile, source, decay
        self.register_buffer("theta", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._found: list[Tensor] = []  # percentiles of this step's batches

    def forward(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE: Tensor = ctx.notes["logits_TE"]
        theta = self.theta
        if self.source == "token":
            theta = torch.quantile(logits_TE, self.percentile / 100, -1, keepdim=True)
        elif ctx.training and logits_TE.numel():
            self._found.append(percentile_of(logits_TE, self.percentile))
        ranked = scores_TE.topk(min(self.most, scores_TE.shape[1]), -1).indices
        allowed_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ranked, True)
        mask_TE = allowed_TE & (logits_TE >= theta)
        return where(mask_TE.scatter(1, ranked[:, :1], True), scores_TE)

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        """Move theta towards the mean percentile of the step's batches, over all ranks."""
        found = torch.stack(self._found) if self._found else self.theta.new_zeros(0)
        both = sum_over_ranks(torch.stack((found.sum(), found.new_tensor(float(len(found))))))
        self._found = []
        if both[1] > 0:
            keep = min(self.decay, int(self.seen) / (int(self.seen) + 1))
            self.theta.copy_(keep * self.theta + (1 - keep) * both[0] / both[1])
            self.seen += 1


def percentile_of(values: Tensor, percentile: float) -> Tensor:
    """The value that `percentile` percent of all entries are below."""
    flat = values.reshape(-1)
    return flat.kthvalue(min(flat.numel(), int(flat.numel() * percentile / 100) + 1)).values


@method("layers.routers.dynamoe", kind="router", fidelity="adapted", paper="2603.01697")
def dynamoe(
    site: Site,
    *,
    schedule: str = "descending",
    least: int = 2,
    most: int = 0,
    total: int = 0,
    waves: float = 1.0,
    percentile: float = 50.0,
    percentile_of: str = "layer",
    decay: float = 0.99,
    balance: Scheduled = 0.01,
) -> StagedRouter:
    """schedule, least, most, total, waves: budgets of the layers, see `layers.schedule.depth`. percentile: tau. decay: of theta."""
    require(percentile_of in SOURCES, f"percentile_of {percentile_of!r}", " or ".join(SOURCES))
    require(0 <= percentile <= 100, f"percentile {percentile}", "0 to 100")
    require(0 <= decay < 1, f"decay {decay}", "0 to below 1")
    e = site.num_experts
    most = most or min(e, max(least, 2 * site.top_k))
    require(most <= e, f"most {most} of {e} experts", "no more than the experts")
    budget = budgets(schedule, site.layers, least, most, waves=waves, ceiling=e, total=total)[site.layer]
    return StagedRouter(
        score=Linear(site, bias=True),
        normalise=noted_softmax,
        select=Threshold(budget, percentile, percentile_of, decay),
        combine=Combine("softmax"),
        losses={"balance": Balance(site, balance)},
    )
