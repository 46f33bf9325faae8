"""AdaMoE: null experts among the candidates, so that each token takes as many true ones as it needs.

Paper      Zeng et al. 2024, arXiv 2406.13233
Idea       With m null experts and more slots than before, a slot spent on a null costs nothing; the balance loss fixes the mean number of
           true experts at about K n / (n + m), the token decides its own.
Rule       p = softmax over n true and m null experts; S = the K largest; g = p over the chosen true experts' sum, 0 for nulls
           loss = alpha (n + m) sum_e f_e P_e, where every null has the mean f of the nulls
Needs      experts of kind 'zero' among the special ones, {"name": "zero", "count": m}; without them it is plain top-k
Gives      a router with balance loss; an all-null token gets zeros
Departs    nothing. All rows of the gate start at random (in a pretrained model the paper copies true rows to the nulls, whose ties then
           decide). f sums to 1; weight 1e-4 is that of the fine-tuned Mixtral, from scratch 0.01 is usual
Checked    nulls masked: plain top-k renormalised; renaming nulls changes nothing, the loss included; an all-null token is zero
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
from moestro.layers.stages import Draft, Linear, TopK, softmax


class AmongOthers(nn.Module):
    """Probabilities over their sum on the chosen experts that are not of kind 'zero'; 0 for those, and for a token with none else."""

    void_E: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.register_buffer("void_E", torch.tensor([kind == "zero" for kind in site.bank().kinds]), persistent=False)

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        weights_TK = draft.chosen(draft.probs_TE.masked_fill(self.void_E, 0.0))
        return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)


class TiedBalance(Balance):
    """The balance loss in which null experts share the mean of their frequencies: they need not be even among each other."""

    void_E: Tensor

    def __init__(self, site: Site, weight: Scheduled) -> None:
        super().__init__(site, weight)
        self.register_buffer("void_E", torch.tensor([kind == "zero" for kind in site.bank().kinds]), persistent=False)

    def _frequency(self, count_E: Tensor, tokens: Tensor | float) -> Tensor:
        f_E = super()._frequency(count_E, tokens)
        mean = f_E[..., self.void_E].sum(-1, keepdim=True) / self.void_E.sum().clamp_min(1)
        return torch.where(self.void_E, mean, f_E)


@method("layers.routers.adamoe", kind="router", fidelity="faithful", paper="2406.13233")
def adamoe(site: Site, *, balance: Scheduled = 1e-4) -> StagedRouter:
    """balance: alpha; the stronger, the tighter the mean number of true experts."""
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=AmongOthers(site),
        losses={"balance": TiedBalance(site, balance)},
    )
