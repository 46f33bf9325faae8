"""Union-of-Experts: slices of one feed-forward layer as experts, each taking the tokens of a sequence that want it most.

Paper      Yang et al. 2025, arXiv 2503.02495
Idea       A dense layer cut by hidden units is exactly the sum of its slices; leaving out the slices that matter least is routing.
Rule       s = softmax(x W + b); G = s on the token's k best, else 0; each expert takes, of each sequence, the share of positions with the
           largest G ('patch-wise selection'); y = sum of the chosen slices, unweighted, so that all slices are the dense layer
Needs      experts whose union is the dense layer: num_experts of width d_dense / num_experts (bank `stacked`)
Gives      a router without losses; with the mixer `selective_heads` it is the paper's whole model (recipe `union`)
Departs    The released code gives the gate no gradient; weights here are 1 + s - stopgrad(s). It divides G by its sum over the batch, which
           couples samples: left out. Choosing positions of a sequence sees later tokens: it is for training (trait causal-in-training), and evaluation takes
           each token's k best. The alternative that routes whole sequences needs one length and is not built
Checked    k = E and all positions are the dense layer to 1e-6; each expert has its share; the leak
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, Linear, mask_of, softmax, where


class Patches:
    """Each token's k best experts, of which an expert keeps the positions of each sequence that want it most."""

    def __init__(self, k: int, share: float) -> None:
        self.k, self.share = k, share

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        best_TK = scores_TE.topk(self.k, -1).indices
        if not ctx.training or self.share == 1.0 or not len(scores_TE):
            return best_TK
        wanted = scores_TE.masked_fill(~mask_of(best_TK, scores_TE.shape[1]), float("-inf"))
        sequence_T = torch.zeros(len(wanted), dtype=torch.int64) if ctx.sequence_T is None else ctx.sequence_T
        kept = torch.zeros_like(wanted, dtype=torch.bool)
        for sequence in sequence_T.unique().tolist():
            mine = (sequence_T == sequence).nonzero()[:, 0]
            top = wanted[mine].topk(math.ceil(self.share * len(mine)), 0).indices
            kept[mine] = torch.zeros(len(mine), wanted.shape[1], dtype=torch.bool).scatter(0, top, True)
        return where(kept & wanted.isfinite(), scores_TE)


class Unweighted(nn.Module):
    """1, with the gradient of the probability."""

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        g = draft.chosen(draft.probs_TE)
        return (1 + (g - g.detach())).masked_fill(draft.experts_TK < 0, 0.0)


@method("layers.routers.union", kind="router", fidelity="adapted", paper="2503.02495", traits=("causal-in-training",))
def union(site: Site, *, share: float = 0.5) -> StagedRouter:
    """share: of a sequence's positions that an expert may take in training; 1 lets all tokens have their k best."""
    require(0 < share <= 1, f"share {share}", "above 0, at most 1")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(score=Linear(site, bias=True), normalise=softmax, select=Patches(site.top_k, share), combine=Unweighted())
