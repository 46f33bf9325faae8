"""THOR: no router. Experts are drawn at random, in training and after it.

Paper      Zuo et al. 2021, arXiv 2110.04260
Idea       Experts that must agree whichever is drawn need no gate and no balance; the objective `consistency` makes them agree.
Rule       training: one expert for the whole batch, uniformly, for each layer and pass; weight 1
           evaluation: one per token, one per sequence, or the mean of all
Needs      the objective `consistency`, without which the experts have no reason to agree
Gives      a router without parameters or losses
Departs    the logits are the draws (Gumbel noise), so that the best score is a uniform draw and a banned expert is never drawn. Traits
           batch and deterministic: every call draws afresh; gradient: nothing to learn
Checked    one expert per training batch; equal frequencies; one per sequence; the mean of all experts; with the objective, less spread
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, TopK, softmax

INFERENCE = ("token", "sequence", "all")


class Draw:
    """logits_TE: Gumbel noise, one row for the batch in training, else one for each token or sequence."""

    def __init__(self, experts: int, inference: str) -> None:
        self.experts, self.inference = experts, inference

    def __call__(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        row_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        if ctx.training:
            row_T = torch.zeros_like(row_T)
        elif self.inference == "sequence" and ctx.sequence_T is not None:
            row_T = torch.as_tensor(ctx.sequence_T).unique(return_inverse=True)[1]
        rows = int(row_T.max()) + 1 if len(row_T) else 0
        return x_TD.new_empty(rows, self.experts).exponential_(generator=ctx.rng).log().neg()[row_T]


class OneOrAll:
    """The best score; all experts in evaluation by the mean of all."""

    def __init__(self, inference: str) -> None:
        self.inference = inference

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        everyone = self.inference == "all" and not ctx.training
        return TopK(scores_TE.shape[1] if everyone else 1)(scores_TE, ctx)


class Mean(nn.Module):
    """Equal weights that sum to 1."""

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        there = (draft.experts_TK >= 0).float()
        return there / there.sum(1, keepdim=True).clamp_min(1.0)


@method(
    "layers.routers.thor",
    kind="router",
    fidelity="faithful",
    paper="2110.04260",
    traits=("batch", "deterministic", "gradient"),
)
def thor(site: Site, *, inference: str = "token") -> StagedRouter:
    """inference: 'token' or 'sequence' draws one expert for each, 'all' takes the mean of all experts."""
    require(inference in INFERENCE, f"inference {inference!r}", "one of " + ", ".join(INFERENCE))
    return StagedRouter(score=Draw(site.num_experts, inference), normalise=softmax, select=OneOrAll(inference), combine=Mean())
