"""The stages of a router that many methods share: scores, normalisation, selection and combine weights.

score      (x_TD, ctx) -> logits_TE           normalise  (logits_TE, ctx) -> probs_TE
select     (scores_TE, ctx) -> experts_TK     combine    (Draft, ctx) -> weights_TK
A score of -inf is never selected: such a slot becomes empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moestro.core.routing import EMPTY, RouteContext
from moestro.layers.site import Site, require

COMBINE = ("raw", "renormalised", "softmax", "sigmoid", "constant")


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known when the combine weights are made. x_TD is float32."""

    x_TD: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    experts_TK: Tensor

    def chosen(self, values_TE: Tensor) -> Tensor:
        """values_TK: the entries of the chosen experts, 0 in empty slots."""
        return chosen(values_TE, self.experts_TK)


def chosen(values_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """values_TK: values_TE at the ids of experts_TK, 0 in empty slots."""
    picked = values_TE.gather(1, experts_TK.clamp_min(0))
    return torch.where(experts_TK < 0, torch.zeros_like(picked), picked)


def mask_of(experts_TK: Tensor, num_experts: int) -> Tensor:
    """bool_TE: which experts each token has."""
    mask = torch.zeros(experts_TK.shape[0], num_experts + 1, dtype=torch.bool, device=experts_TK.device)
    return mask.scatter_(1, experts_TK + 1, True)[:, 1:]


class Linear(nn.Module):
    """logits = x W^T (+ b): the usual gate. The weight is [E, D]; `zero` starts it at 0. Leaves it as rows_ED in ctx.notes for losses."""

    def __init__(self, site: Site, *, bias: bool = False, zero: bool = False) -> None:
        super().__init__()
        self.gate = site.linear(site.num_experts, bias=bias)
        if zero:
            nn.init.zeros_(self.gate.weight)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        bias, rows_ED = self.gate.bias, self.gate.weight.float()
        ctx.notes["rows_ED"] = rows_ED
        return nn.functional.linear(x_TD, rows_ED, None if bias is None else bias.float())


def softmax(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE.softmax(-1)


def sigmoid(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE.sigmoid()


def relu(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE.relu()


def identity(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    return logits_TE


NORMALISE = {"softmax": softmax, "sigmoid": sigmoid, "relu": relu, "identity": identity}


class TopK:
    """The k largest scores, best first."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE.topk(min(self.k, scores_TE.shape[1]), -1).indices


def where(mask_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """experts_TK of a mask: each token's marked experts by falling score, padded with empty slots to the largest count."""
    slots = int(mask_TE.sum(1).max()) if mask_TE.shape[0] else 0
    ranked = scores_TE.masked_fill(~mask_TE, float("-inf")).topk(slots, -1).indices
    return torch.where(mask_TE.gather(1, ranked), ranked, torch.full_like(ranked, EMPTY))


class Combine(nn.Module):
    """Combine weights by an explicit convention, times `scale`.

    raw: probs of the chosen. renormalised: probs divided by their sum over the chosen. softmax: softmax over the chosen logits.
    sigmoid: sigmoid of the chosen logits. constant: 1.
    """

    def __init__(self, convention: str, scale: float = 1.0) -> None:
        super().__init__()
        require(convention in COMBINE, f"combine weights {convention!r}", "one of " + ", ".join(COMBINE))
        self.convention, self.scale = convention, scale

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        empty = draft.experts_TK < 0
        if self.convention == "constant":
            weights = torch.ones_like(draft.probs_TE[:, :1]).expand(draft.experts_TK.shape)
        elif self.convention == "softmax":
            logits = draft.chosen(draft.logits_TE).masked_fill(empty, float("-inf"))
            # A row without any expert would be NaN.
            weights = logits.masked_fill(empty.all(1, keepdim=True), 0.0).softmax(-1)
        elif self.convention == "sigmoid":
            weights = draft.chosen(draft.logits_TE).sigmoid()
        else:
            weights = draft.chosen(draft.probs_TE)
            if self.convention == "renormalised":
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return (weights * self.scale).masked_fill(empty, 0.0)

    def extra_repr(self) -> str:
        return f"{self.convention}, scale={self.scale}"
