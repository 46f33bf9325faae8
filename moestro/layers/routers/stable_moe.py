"""StableMoE: learn a balanced routing, distil it into a router of token ids, then never change it again.

Paper      Dai et al. 2022, arXiv 2204.08396
Idea       A token that changes its expert late in training wastes what that expert learned of it. Fix who goes where after a short first stage.
Rule       stage 1: s = x C^T, a = argmax s, g = sigmoid(s_a); s' = D(id) C'^T is trained to predict a
           loss = balance mean_t ((|A_a| - n) / n) sigmoid(s_ta) + distil mean_t CE(s'_t, a_t), n = T / E, the first factor constant
           stage 2 and evaluation: a = argmax s', D and C' fixed, no such losses; g still from s
           bigrams: D(id) is the mean of the embeddings of the current and the previous id
Needs      token ids, and the phase `freeze_routing`, which starts stage 2; experts of the paper: the bank `sublayers`
Gives      a router with both losses and capacity; the stage is a saved buffer; top_k of the configuration is not read: it is 1
Departs    means over tokens where the code has sums, as its task loss has; evaluation drops nothing. Traits: relabel-in-evaluation, the
           distilled router's rows belong to experts; batch-in-training, tokens compete for places
Checked    stage 2 is a function of the id and moves nothing of D; both losses by hand; the layer starts as the identity with `sublayers`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, TopK, softmax
from moestro.layers.taps.capacity import Capacity


class TwoRouters(nn.Module):
    """centroid_ED: the learned router. ids_VW and distilled_EW: the distilled one. settled: whether stage 2 has begun.

    logits_TE are those that decide. Leaves scores_TE (s) and, in stage 1 of training, distilled_TE (s') in ctx.notes.
    """

    settled: Tensor

    def __init__(self, site: Site, width: int, bigrams: bool) -> None:
        super().__init__()
        self.bigrams = bigrams
        self.centroid_ED = nn.Parameter(nn.init.orthogonal_(torch.empty(site.num_experts, site.d_model), gain=0.1))
        self.ids_VW = nn.Parameter(torch.randn(site.vocabulary, width))
        self.distilled_EW = nn.Parameter(nn.init.orthogonal_(torch.empty(site.num_experts, width), gain=0.1))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        scores_TE = x_TD @ self.centroid_ED.float().t()
        distilled_TE = self._distilled(ctx)
        ctx.notes["scores_TE"] = scores_TE
        ctx.notes["learning"] = ctx.training and not bool(self.settled)
        if ctx.notes["learning"]:
            ctx.notes["distilled_TE"] = distilled_TE
            return scores_TE
        # Adding nothing hands on NaN, so that a damaged input is refused although ids alone decide.
        return distilled_TE.detach() + 0.0 * scores_TE.detach().sum(-1, keepdim=True)

    def _distilled(self, ctx: RouteContext) -> Tensor:
        require(ctx.token_ids_T is not None, "the router stable_moe without token ids", "token ids in the context")
        own_TW = functional.embedding(torch.as_tensor(ctx.token_ids_T), self.ids_VW.float())
        if self.bigrams and len(own_TW):
            before_TW = torch.cat((own_TW[:1], own_TW[:-1]))
            if ctx.sequence_T is not None:
                starts_T = torch.as_tensor(ctx.sequence_T).diff(prepend=torch.full((1,), -1)) != 0
                before_TW = torch.where(starts_T[:, None], own_TW, before_TW)
            own_TW = (own_TW + before_TW) / 2
        return own_TW @ self.distilled_EW.float().t()


class SigmoidOfScores(nn.Module):
    """sigmoid of the learned score of the chosen expert, whichever router chose it."""

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        scores_TE = draft.logits_TE if ctx.notes["learning"] else ctx.notes["scores_TE"]
        return draft.chosen(scores_TE.sigmoid())


class Excess(nn.Module):
    """The balance loss: tokens of crowded experts are pushed away, those of empty ones pulled."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        if not decision.ctx.notes["learning"]:
            return decision.x_TD.new_zeros(())
        scores_TE = decision.logits_TE
        best_T = scores_TE.argmax(-1)
        even = len(best_T) / scores_TE.shape[1]
        excess_E = torch.bincount(best_T, minlength=scores_TE.shape[1]) / even - 1
        own_T = scores_TE.gather(1, best_T[:, None])[:, 0].sigmoid()
        return value_at(self.weight, decision.ctx.step) * (excess_E[best_T] * own_T).mean()


class Distil(nn.Module):
    """Cross entropy of the distilled router on what the learned one prefers; no gradient to the latter."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        if not decision.ctx.notes["learning"]:
            return decision.x_TD.new_zeros(())
        best_T = decision.ctx.notes["scores_TE"].argmax(-1)
        return value_at(self.weight, decision.ctx.step) * functional.cross_entropy(decision.ctx.notes["distilled_TE"], best_T)


@method(
    "layers.routers.stable_moe",
    kind="router",
    fidelity="faithful",
    paper="2204.08396",
    traits=("relabel-in-evaluation", "batch-in-training"),
)
def stable_moe(
    site: Site,
    *,
    balance: Scheduled = 0.3,
    distil: Scheduled = 0.3,
    width: int = 50,
    bigrams: bool = False,
    capacity: float = 2.0,
) -> StagedRouter:
    """balance, distil: weights of the losses. width: of the ids' embedding. bigrams: for small vocabularies. capacity: factor, 0 no limit."""
    require(width >= 1, f"width {width}", "at least 1")
    require(site.vocabulary >= 1, "a model without a vocabulary", "token ids to route by")
    return StagedRouter(
        score=TwoRouters(site, width, bigrams),
        normalise=softmax,
        select=TopK(1),
        combine=SigmoidOfScores(),
        taps=[Capacity(site, capacity, 0.0)],
        losses={"balance": Excess(balance), "distil": Distil(distil)},
    )
