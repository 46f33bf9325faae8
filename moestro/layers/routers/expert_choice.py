"""Expert Choice: each expert takes the tokens that want it most, so that all experts have the same load.

Paper      Zhou et al. 2022, arXiv 2202.09368
Idea       Transpose the problem: a token may have any number of experts, an expert always has b tokens.
Rule       S = softmax_e(x W^T); b = round(T c / E); expert e takes its b tokens with the largest S_te; weights are S, raw; no loss
           most m > 0: at most m experts for a token, from the entropic plan A: max <S, A> + lambda H(A), sum_t A_te = b,
           sum_e A_te <= m, 0 <= A <= 1, by Dykstra's projections; then each expert's b largest A
Needs      the routings of a step (controller, for the thresholds)
Gives      a router without losses; threshold_E is a saved buffer
Departs    The paper's rule needs the whole batch and sees later tokens; it is for training (traits batch-in-training and
           causal-in-training). Evaluation is ours, token by token: 'threshold' takes expert e where S_te >= the running mean
           of its b-th largest score in training (before any training, and with 'topk', the c best experts). With most, the b
           largest A would exceed m here and there: experts ask tokens in the order of A and a token keeps its m largest; lambda is
           0.01 (paper 0.001), which is nearer to the best plan after 100 rounds
Checked    b tokens each; permuting tokens permutes the routing; c = E is the dense mixture; the leak; the plan against linear programming
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import Output
from moestro.layers.reduce import sum_over_ranks
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, softmax, where

INFERENCE = ("threshold", "topk")


class ExpertsChoose(nn.Module):
    """The selection, and the controller that keeps each expert's threshold."""

    threshold_E: Tensor
    seen_E: Tensor

    def __init__(self, site: Site, c: float, most: int, temperature: float, rounds: int, inference: str, decay: float) -> None:
        super().__init__()
        self.layer, self.c, self.most, self.temperature, self.rounds = site.layer, c, most, temperature, rounds
        self.inference, self.decay = inference, decay
        self.register_buffer("threshold_E", torch.zeros(site.num_experts))
        self.register_buffer("seen_E", torch.zeros(site.num_experts, dtype=torch.int64))

    def forward(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        tokens, experts = scores_TE.shape
        if not tokens:
            return where(torch.zeros_like(scores_TE, dtype=torch.bool), scores_TE)
        if not ctx.training:
            return self._alone(scores_TE)
        b = min(tokens, max(1, round(tokens * self.c / experts)))
        if 0 < self.most < experts:
            b = min(b, tokens * self.most // experts)
            return where(matched(capped_plan(scores_TE, b, self.most, self.temperature, self.rounds), b, self.most), scores_TE)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(0, scores_TE.topk(b, 0).indices, True)
        return where(mask_TE, scores_TE)

    def _alone(self, scores_TE: Tensor) -> Tensor:
        """Each token on its own."""
        best = scores_TE.topk(min(max(1, round(self.c)), scores_TE.shape[1]), -1).indices
        if self.inference == "topk" or not bool(self.seen_E.any()):
            return best
        wanted_TE = (scores_TE >= self.threshold_E) & (self.seen_E > 0)
        if self.most:
            ranked = scores_TE.masked_fill(~wanted_TE, float("-inf")).topk(min(self.most, scores_TE.shape[1]), -1).indices
            wanted_TE &= torch.zeros_like(wanted_TE).scatter_(1, ranked, True)
        return where(wanted_TE, scores_TE)

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        """Move each threshold towards the smallest score that its expert took, the mean over micro-batches and ranks."""
        experts = self.threshold_E.shape[0]
        total = self.threshold_E.new_zeros(2, experts)
        for output in outputs:
            routing = output.routings[self.layer]
            ids, weights = routing.experts_TK.reshape(-1), routing.weights_TK.detach().reshape(-1)
            least = weights.new_full((experts + 1,), math.inf).scatter_reduce(0, ids + 1, weights, "amin")[1:]
            took = least.isfinite()
            total += torch.stack((least.masked_fill(~took, 0.0), took.float()))
        total = sum_over_ranks(total)
        took = total[1] > 0
        now_E = total[0] / total[1].clamp_min(1.0)
        # The first steps are a plain mean, so that the start at 0 is forgotten at once.
        keep_E = torch.minimum(self.seen_E / (self.seen_E + 1.0), self.seen_E.new_tensor(self.decay, dtype=torch.float32))
        self.threshold_E.copy_(torch.where(took, keep_E * self.threshold_E + (1 - keep_E) * now_E, self.threshold_E))
        self.seen_E += took


def capped_plan(scores_TE: Tensor, b: int, most: int, temperature: float, rounds: int) -> Tensor:
    """log A_TE of the capped plan: columns sum to b, rows to at most `most`, entries at most 1. Scores of -inf stay -inf."""
    plan = scores_TE.double() / temperature
    row_correction, box_correction = torch.zeros_like(plan), torch.zeros_like(plan)
    for _ in range(rounds):
        columns = plan.logsumexp(0, keepdim=True)
        plan = plan + torch.where(columns.isneginf(), 0.0, math.log(b) - columns)
        before = plan + row_correction
        excess = (before.logsumexp(1, keepdim=True) - math.log(most)).clamp_min(0.0)
        plan, row_correction = before - excess, excess.expand_as(plan)
        before = plan + box_correction
        plan = before.clamp_max(0.0)
        box_correction = before.clamp_min(0.0)
    return plan


def matched(plan_TE: Tensor, b: int, most: int) -> Tensor:
    """bool_TE: each expert's b tokens, at most `most` experts a token. Experts ask tokens in the order of the plan, tokens keep the best.

    A token that refused is not asked again, so this ends; an expert stays short only when nobody with room is left for it.
    """
    mask_TE = torch.zeros_like(plan_TE, dtype=torch.bool)
    refused_TE = plan_TE.isneginf()
    place_b1 = torch.arange(b, device=plan_TE.device)[:, None]
    while True:
        left_TE = plan_TE.masked_fill(mask_TE | refused_TE, float("-inf"))
        best = left_TE.topk(b, 0)
        asked_bE = (place_b1 < b - mask_TE.sum(0)) & ~best.values.isneginf()
        if not bool(asked_bE.any()):
            return mask_TE
        held_TE = mask_TE | torch.zeros_like(mask_TE).scatter_(0, best.indices, asked_bE)
        kept = plan_TE.masked_fill(~held_TE, float("-inf")).topk(most, -1).indices
        mask_TE = held_TE & torch.zeros_like(mask_TE).scatter_(1, kept, True)
        refused_TE = refused_TE | (held_TE & ~mask_TE)


@method(
    "layers.routers.expert_choice",
    kind="router",
    fidelity="adapted",
    paper="2202.09368",
    traits=("batch-in-training", "causal-in-training"),
)
def expert_choice(
    site: Site,
    *,
    capacity: float = 2.0,
    most: int = 0,
    temperature: float = 0.01,
    rounds: int = 100,
    inference: str = "threshold",
    decay: float = 0.99,
) -> StagedRouter:
    """capacity: c, the mean number of experts per token. most: m, 0 for no cap; temperature, rounds: of its plan. decay: of thresholds."""
    e = site.num_experts
    require(0 < capacity <= e, f"capacity {capacity} of {e} experts", "above 0, at most the experts")
    require(inference in INFERENCE, f"inference {inference!r}", " or ".join(INFERENCE))
    require(most == 0 or most >= capacity, f"most {most} below capacity {capacity}", "0, or at least the capacity")
    require(temperature > 0 and rounds >= 1, f"temperature {temperature}, {rounds} rounds", "above 0 and at least 1")
    require(0 <= decay < 1, f"decay {decay}", "0 to below 1")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=ExpertsChoose(site, capacity, most, temperature, rounds, inference, decay),
        combine=Combine("raw"),
    )
