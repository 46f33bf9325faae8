"""EvoMoE: a gate that begins dense and is annealed to sparse.

Paper      Nie et al. 2021, arXiv 2112.14397
Idea       Experts that all see all tokens at first can be told apart; then noise and temperature fall and each token keeps the few it needs.
Rule       training: G = softmax((z + Gumbel noise) / tau), S = where G > threshold; g = softmax z on S, or G on S, not renormalised
           tau falls from step to step; evaluation: top-1, g its softmax; loss = alpha E sum_e f_e P_e, f_e = c_e / T, P from G
Needs      the phase `diversify`, which trains one expert first and copies it into all, with each copy perturbed
Gives      a router with balance loss that the phase can hold to a single expert; top_k of the configuration is not read
Departs    no capacity in evaluation (the code's cap there is an oversight). P is from G for both kinds of weights. The steps of tau are ours:
           set them to the run's. At tau 1 nearly every G passes 0.001: sparsity comes with low tau. Traits: batch-in-training, noise is drawn
           afresh; relabel-in-training, it is drawn for places
Checked    large tau: even and dense; small tau: one expert, drawn as softmax z says; the number of experts falls with tau
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Ramp, Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Draft, Linear, TopK, where
from moestro.layers.taps.single_expert import SingleExpert

FALLS = Ramp(1.0, 0.5, 1000)


class GumbelSoftmax(nn.Module):
    """G in training, softmax z in evaluation."""

    def __init__(self, temperature: Scheduled) -> None:
        super().__init__()
        self.temperature = read(temperature)

    def forward(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not ctx.training:
            return logits_TE.softmax(-1)
        noise_TE = torch.empty_like(logits_TE).exponential_(generator=ctx.rng).clamp_min(1e-20).log().neg()
        return ((logits_TE + noise_TE) / value_at(self.temperature, ctx.step)).softmax(-1)


class Passing:
    """In training every expert above the threshold, and the best one; else the best one."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        best_TK = TopK(1)(scores_TE, ctx)
        if not ctx.training:
            return best_TK
        return where((scores_TE > self.threshold).scatter(1, best_TK, True), scores_TE)


class PlainOrGumbel(nn.Module):
    """softmax z on the chosen; with `gumbel`, what chose them."""

    def __init__(self, gumbel: bool) -> None:
        super().__init__()
        self.gumbel = gumbel

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        return draft.chosen(draft.probs_TE if self.gumbel else draft.logits_TE.softmax(-1))


@method(
    "layers.routers.evomoe",
    kind="router",
    fidelity="adapted",
    paper="2112.14397",
    traits=("batch-in-training", "relabel-in-training"),
)
def evomoe(
    site: Site,
    *,
    temperature: Scheduled = FALLS,
    threshold: float = 0.001,
    gumbel_weights: bool = False,
    balance: Scheduled = 0.01,
) -> StagedRouter:
    """temperature: tau; 'linear' or 'exponential', over the run's steps. gumbel_weights: g = G. balance: alpha."""
    kept = read(temperature)
    ends = (kept,) if isinstance(kept, int | float) else (kept.start, kept.end)
    require(all(end > 0 for end in ends), f"temperature {temperature}", "above 0")
    require(0 <= threshold < 1, f"threshold {threshold}", "0 to below 1")
    return StagedRouter(
        score=Linear(site),
        normalise=GumbelSoftmax(kept),
        select=Passing(threshold),
        combine=PlainOrGumbel(gumbel_weights),
        taps=[SingleExpert()],
        losses={"balance": Balance(site, balance, convention="tokens")},
    )
