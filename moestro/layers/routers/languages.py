"""Mixture of language experts: the expert of the recognised language and an agnostic one, blended by how sure the recogniser is.

Paper      Kwon and Chung 2023, arXiv 2302.13750
Idea       Few active weights for many languages, and a wrong guess that is unsure costs little.
Rule       p = softmax of a light classifier; l* = argmax p, r = p_l*; y = r E_l*(x) + (1 - r) E_agnostic(x); the same (l*, r) in all layers
           loss = identify * CE(p, language), once
Needs      in training the language of each token as ctx.carry["domain_T"] (moestro train gives the domain); none at inference
           experts 0 .. E-2 are languages, E-1 is the agnostic one
Gives      a router with a classification loss
Departs    inferred from the abstract: classifier and reliability. The paper classifies an utterance; level 'prefix' (default) classifies what has
           been read up to each token, which is causal, 'sequence' the whole row (it sees later tokens), 'token' each alone. The classifier reads the
           first layer's input. Trait relabel: experts have fixed roles
Checked    r = 1 is the language's expert, r = 0 the agnostic one; two active experts; one decision for all layers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft

LEVELS = ("prefix", "sequence", "token")
_CARRIED = "language_logits"


class Recogniser(nn.Module):
    """Two layers; one module of all sites. It reads means over tokens at its level."""

    def __init__(self, site: Site, width: int, level: str) -> None:
        super().__init__()
        self.level = level
        self.maps = nn.Sequential(
            nn.RMSNorm(site.d_model),
            site.linear(width, bias=True),
            nn.GELU(),
            site.linear(site.num_experts - 1, width, bias=True),
        )

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        if ctx.sequence_T is None or self.level == "token":
            return self.maps(x_TD)
        _, row_T = ctx.sequence_T.unique(return_inverse=True)
        mean_TD = x_TD.clone()
        for row in range(int(row_T.max()) + 1 if len(row_T) else 0):
            mine = (row_T == row).nonzero()[:, 0]
            if self.level == "sequence":
                mean_TD[mine] = x_TD[mine].mean(0, keepdim=True)
            else:
                count = torch.arange(1, len(mine) + 1, device=x_TD.device)[:, None]
                mean_TD[mine] = x_TD[mine].cumsum(0) / count
        return self.maps(mean_TD)


class OncePerPass(nn.Module):
    """logits_TE: the languages' as the first layer found them, 0 for the agnostic expert, which is no language."""

    def __init__(self, recogniser: Recogniser) -> None:
        super().__init__()
        self.recogniser = recogniser

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        ctx.notes["decides"] = _CARRIED not in ctx.carry
        if ctx.notes["decides"]:
            ctx.carry[_CARRIED] = self.recogniser(x_TD, ctx)
        return functional.pad(ctx.carry[_CARRIED], (0, 1))


def _languages(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return functional.pad(logits_TE[:, :-1].softmax(-1), (0, 1))


def _best_and_agnostic(scores_TE: Tensor, ctx: RouteContext) -> Tensor:
    last = scores_TE.shape[1] - 1
    return torch.stack((scores_TE[:, :last].argmax(-1), torch.full((len(scores_TE),), last)), 1)


class Reliability(nn.Module):
    """r for the language, 1 - r for the agnostic expert."""

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        r = draft.chosen(draft.probs_TE)[:, :1]
        return torch.cat((r, 1 - r), 1).masked_fill(draft.experts_TK < 0, 0.0)


class Identify(nn.Module):
    """The classifier's cross-entropy, in the layer that decided."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        language_T, logits = decision.ctx.carry.get("domain_T"), decision.logits_TE[:, :-1]
        if language_T is None or not decision.ctx.notes["decides"]:
            return logits.sum() * 0.0
        if int(language_T.max()) >= logits.shape[1]:
            raise InputError(
                f"language {int(language_T.max())} of a model for {logits.shape[1]}",
                expected="num_experts = languages + 1",
                fix="--set model.num_experts=N",
            )
        return value_at(self.weight, decision.ctx.step) * functional.cross_entropy(logits, language_T)


@method("layers.routers.languages", kind="router", fidelity="adapted", paper="2302.13750", traits=("relabel",))
def languages(site: Site, *, level: str = "prefix", width: int = 32, identify: Scheduled = 0.1) -> StagedRouter:
    """level: 'prefix', 'sequence' or 'token'. width: of the classifier. identify: weight of its loss. top_k is not read: it is 2."""
    require(site.num_experts >= 2, f"{site.num_experts} experts", "at least one language and the agnostic one")
    require(level in LEVELS, f"level {level!r}", "one of " + ", ".join(LEVELS))
    recogniser: Recogniser = site.shared("language_recogniser", lambda: Recogniser(site, width, level))
    return StagedRouter(
        score=OncePerPass(recogniser),
        normalise=_languages,
        select=_best_and_agnostic,
        combine=Reliability(),
        losses={"identify": Identify(identify)},
    )
