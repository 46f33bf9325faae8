"""Decoupled weights: one map chooses the experts, another says how much each contributes.

Paper      Shen et al. 2025, AdaMoE for vision-language-action models, arXiv 2510.14300
Idea       An expert that is right for a token need not dominate it: relevance and contribution are different questions.
Rule       p = softmax(x W^T); S = the K largest p; a = x V^T, signed; g = p + a on S
           loss = lambda mean_e (c_e / T) P_e, which is 1 / E^2 of the usual form; lambda 0.01 for 500 steps, then 0.005
Needs      nothing. In the paper the block is `halved`, and the experts are copies of a dense feed-forward
Gives      a router with balance loss
Departs    V starts like every map; the paper's standard deviation is 0.006. Trait relabel: V has a row for each
           expert, which renaming the logits alone does not rename
Checked    V = 0: plain raw top-k; V never changes the choice; equal experts and one slot: p + a times the expert
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Ramp, Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, Linear, TopK, softmax

PAPERS = Ramp(0.01, 0.005, 500, shape="step")


class Adapted(nn.Module):
    """Raw probabilities plus a linear map of the input."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.adapter = site.linear(site.num_experts)

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        return draft.chosen(draft.probs_TE + nn.functional.linear(draft.x_TD, self.adapter.weight.float()))


@method("layers.routers.decoupled", kind="router", fidelity="faithful", paper="2510.14300", traits=("relabel",))
def decoupled(site: Site, *, balance: Scheduled = PAPERS) -> StagedRouter:
    """balance: lambda."""
    e = site.num_experts
    require(site.top_k <= e, f"top_k {site.top_k} of {e} experts", "no more slots than experts")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Adapted(site),
        losses={"balance": Balance(site, balance, convention="tokens", weight_E=torch.full((e,), e**-2.0))},
    )
