"""MoGE: the same number of experts in every group, so that devices have equal loads for every single token.

Paper      Pangu team 2025, arXiv 2505.21411
Idea       Balance among devices by construction: a group is a device, each gives K / M of a token's K experts.
Rule       p = softmax(x W^T) over all experts; in each of M contiguous groups the K / M largest p; g = p s, not renormalised, with
           a learned scale s per expert that starts at 1; loss = alpha E sum_e f_e P_e evens the experts inside a group
Needs      nothing
Gives      a router with balance loss
Departs    groups 0 means as many groups as slots, one expert from each. The weight of the loss is ours, as the paper's was not seen. Trait
           relabel: groups are contiguous. voted (a deployment form: in evaluation each group keeps only the experts that
           most tokens of the batch chose) makes tokens depend on each other and is off
Checked    equal loads of all groups for every token; one group is plain top-k
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, Linear, mask_of, softmax


class GroupedTopK:
    """The `each` best experts of every group, best group first; with `voted`, of its most chosen experts only."""

    def __init__(self, groups: int, each: int, voted: int) -> None:
        self.groups, self.each, self.voted = groups, each, voted

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        experts_TK = self._pick(scores_TE)
        if not self.voted or ctx.training:
            return experts_TK
        votes_GX = mask_of(experts_TK, scores_TE.shape[1]).sum(0).unflatten(0, (self.groups, -1))
        kept_GX = torch.zeros_like(votes_GX, dtype=torch.bool).scatter_(1, votes_GX.topk(self.voted, 1).indices, True)
        return self._pick(scores_TE.masked_fill(~kept_GX.flatten(), float("-inf")))

    def _pick(self, scores_TE: Tensor) -> Tensor:
        size = scores_TE.shape[1] // self.groups
        inside_TGK = scores_TE.unflatten(-1, (self.groups, size)).topk(self.each, -1).indices
        return (inside_TGK + size * torch.arange(self.groups, device=scores_TE.device)[:, None]).flatten(1)


class Scaled(nn.Module):
    """Raw probabilities times a learned scale of each expert."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale_E = nn.Parameter(torch.ones(site.num_experts))

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        return draft.chosen(draft.probs_TE * self.scale_E)


@method("layers.routers.moge", kind="router", fidelity="faithful", paper="2505.21411", traits=("relabel",))
def moge(site: Site, *, groups: int = 0, voted: int = 0, balance: Scheduled = 0.01) -> StagedRouter:
    """groups: M, 0 for top_k of them. voted: experts that a group keeps in evaluation, 0 for all."""
    groups = groups or site.top_k
    e, k = site.num_experts, site.top_k
    require(groups >= 1 and e % groups == 0, f"{groups} groups of {e} experts", "a divisor of the experts")
    require(k % groups == 0, f"top_k {k} from {groups} groups", "a multiple of the groups, each gives the same number")
    require(k <= e, f"top_k {k} of {e} experts", "no more slots than experts")
    require(voted == 0 or k // groups <= voted <= e // groups, f"voted {voted}", f"0, or {k // groups} to {e // groups} experts")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=GroupedTopK(groups, k // groups, voted),
        combine=Scaled(site),
        losses={"balance": Balance(site, balance)},
    )
