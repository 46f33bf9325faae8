"""GW-MoE: while fine-tuning, tokens of which the router is unsure go to all experts.

Paper      Wu et al. 2024, arXiv 2406.12375
Idea       An unsure token lands on this expert or that by chance. If all experts learn it, it does not matter later where it lands.
Rule       H_t = -sum_e p_te ln(p_te + 1e-5); in training, a token with H_t >= h ln E, one of the first `slots` such of its sequence, goes to
           all experts with g = p; all others, and every token in evaluation, to the K best with g by `combine`
Needs      sequences of the tokens, else all are taken as one
Gives      a router with balance loss; the host's routing in evaluation
Departs    the experts are run on broadcast tokens, as the paper says and its released code does not. The threshold is a share of
           ln E; the paper's 1.8 and 1.6 nats with 8 experts are 0.87 and 0.77
Checked    h above 1: the host; h 0 without a limit: the dense mixture; evaluation is the host; no more than `slots` of a sequence
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import EMPTY, RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Draft, Linear


class Unsure(nn.Module):
    """Softmax; leaves the mask of broadcast tokens in ctx.notes."""

    def __init__(self, experts: int, threshold: Scheduled, slots: int) -> None:
        super().__init__()
        self.most, self.threshold, self.slots = math.log(experts), read(threshold), slots

    def forward(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        probs_TE = logits_TE.softmax(-1)
        entropy_T = -(probs_TE * (probs_TE + 1e-5).log()).sum(-1).detach()
        unsure_T = entropy_T >= value_at(self.threshold, ctx.step) * self.most
        ctx.notes["broadcast_T"] = self._first(unsure_T, ctx) & ctx.training
        return probs_TE

    def _first(self, unsure_T: Tensor, ctx: RouteContext) -> Tensor:
        """The first `slots` of each sequence."""
        if not self.slots or not len(unsure_T):
            return unsure_T
        row_T = torch.zeros_like(unsure_T, dtype=torch.int64)
        if ctx.sequence_T is not None:
            row_T = torch.as_tensor(ctx.sequence_T).unique(return_inverse=True)[1]
        mine_TB = nn.functional.one_hot(row_T) * unsure_T[:, None]
        return unsure_T & (mine_TB.cumsum(0).gather(1, row_T[:, None])[:, 0] <= self.slots)


class TopKOrAll:
    """The k best experts; all of them for broadcast tokens."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        broadcast_T = ctx.notes["broadcast_T"]
        if not bool(broadcast_T.any()):
            return scores_TE.topk(self.k, -1).indices
        order_TK = scores_TE.argsort(dim=-1, descending=True, stable=True).clone()
        order_TK[:, self.k :].masked_fill_(~broadcast_T[:, None], EMPTY)
        return order_TK


class HostOrRaw(nn.Module):
    """The host's weights; raw probabilities for broadcast tokens."""

    def __init__(self, combine: str) -> None:
        super().__init__()
        self.host = Combine(combine)

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        return torch.where(ctx.notes["broadcast_T"][:, None], draft.chosen(draft.probs_TE), self.host(draft, ctx))


@method("layers.routers.gw_moe", kind="router", fidelity="faithful", paper="2406.12375")
def gw_moe(
    site: Site, *, threshold: Scheduled = 0.8, slots: int = 16, combine: str = "renormalised", balance: Scheduled = 0.01
) -> StagedRouter:
    """threshold: h, share of the largest entropy; above 1 off. slots: broadcast tokens of a sequence, 0 all (paper: 16 in an encoder, 2 in
    a decoder). combine: the host's weights, see `layers.stages.Combine`."""
    require(slots >= 0, f"{slots} slots", "at least 0")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Linear(site),
        normalise=Unsure(site.num_experts, threshold, slots),
        select=TopKOrAll(site.top_k),
        combine=HostOrRaw(combine),
        losses={"balance": Balance(site, balance)},
    )
