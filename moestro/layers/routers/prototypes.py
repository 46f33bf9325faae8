"""ProMoE: tokens go to the nearest learned prototypes; unconditional tokens to an expert of their own.

Paper      2025, arXiv 2510.24711
Idea       In image diffusion tokens are spatially alike, so routers need guidance: a hard split by function, then prototypes that a contrastive
           loss pulls to the mean token of their expert and away from the others', in place of a balance loss.
Rule       tokens of samples without a condition: the last expert, weight 1. All others: c_e = cos(x, p_e), s = c, sigmoid c or softmax c; top-k, raw
           loss = weight * CE(S, diagonal), S_ef = cos(p_e, m_f) / tau over the experts that have tokens, m_f their mean; 0 for fewer than two
Needs      ctx.carry["unconditional_T"], true where the condition was dropped (objective `rectified_flow` gives it); else no token is
Gives      a router with a contrastive loss and no balance loss
Departs    the prototypes' start is N(0, init_std^2), of which only the direction counts. The variant in which experts pick tokens is
           not built. Trait relabel: the last expert is the unconditional one
Checked    all and only unconditional tokens there, weight 1; the length of x does not matter; the loss is ln n for equal cosines, 0 with one expert
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.reduce import counts
from moestro.layers.router import Decision, Normalise, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, TopK, identity, sigmoid, softmax

SCORES = {"identity": identity, "sigmoid": sigmoid, "softmax": softmax}


class Cosine(nn.Module):
    """cos(x, p_e) of the conditional experts, -1 for the unconditional one. Leaves prototypes_ED and unconditional_T in ctx.notes."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.prototypes_ED = nn.Parameter(torch.randn(site.num_experts - 1, site.d_model) * site.init_std)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        dropped_T = ctx.carry.get("unconditional_T")
        ctx.notes["unconditional_T"] = torch.zeros(len(x_TD), dtype=torch.bool) if dropped_T is None else dropped_T
        ctx.notes["prototypes_ED"] = self.prototypes_ED
        cosine = functional.linear(functional.normalize(x_TD, dim=-1), functional.normalize(self.prototypes_ED, dim=-1))
        return functional.pad(cosine, (0, 1), value=-1.0)


class Split(TopK):
    """The k nearest prototypes, or the unconditional expert."""

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        last = scores_TE.shape[1] - 1
        experts_TK = scores_TE[:, :last].topk(self.k, -1).indices
        alone = torch.full_like(experts_TK, -1)
        alone[:, 0] = last
        banned = scores_TE[:, last:] == float("-inf")
        return torch.where(ctx.notes["unconditional_T"][:, None], alone.masked_fill(banned, -1), experts_TK)


class OneForTheUnconditional(nn.Module):
    """Raw scores; 1 for the unconditional expert."""

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        weights = draft.chosen(draft.probs_TE)
        return torch.where(draft.experts_TK == draft.probs_TE.shape[1] - 1, torch.ones_like(weights), weights)


class Contrastive(nn.Module):
    """See the file's header."""

    def __init__(self, weight: Scheduled, tau: float) -> None:
        super().__init__()
        self.weight, self.tau = read(weight), tau

    def forward(self, decision: Decision) -> Tensor:
        prototypes_ED, ids = decision.ctx.notes["prototypes_ED"], decision.chosen.experts_TK
        number = len(prototypes_ED)
        kept = (ids >= 0) & (ids < number)
        token, slot = kept.nonzero(as_tuple=True)
        count_E = counts(ids.masked_fill(~kept, -1), number)
        sums_ED = prototypes_ED.new_zeros(prototypes_ED.shape).index_add(0, ids[token, slot], decision.x_TD[token])
        here = count_E.nonzero()[:, 0]
        if len(here) < 2:
            return prototypes_ED.sum() * 0.0
        means = functional.normalize(sums_ED[here] / count_E[here, None], dim=-1)
        like = functional.normalize(prototypes_ED[here], dim=-1) @ means.t() / self.tau
        return value_at(self.weight, decision.ctx.step) * functional.cross_entropy(like, torch.arange(len(here)))


@method("layers.routers.prototypes", kind="router", fidelity="faithful", paper="2510.24711", traits=("relabel",))
def prototypes(site: Site, *, score: str = "identity", tau: float = 0.07, contrast: Scheduled = 1.0) -> StagedRouter:
    """score: what becomes of the cosine. tau, contrast: temperature and weight of the contrastive loss. One expert is the unconditional one."""
    require(score in SCORES, f"score {score!r}", "one of " + ", ".join(SCORES))
    require(site.top_k < site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "one expert more than slots")
    require(tau > 0, f"tau {tau}", "above 0")
    normalise: Normalise = SCORES[score]
    return StagedRouter(
        score=Cosine(site),
        normalise=normalise,
        select=Split(site.top_k),
        combine=OneForTheUnconditional(),
        losses={"contrast": Contrastive(contrast, tau)},
    )
