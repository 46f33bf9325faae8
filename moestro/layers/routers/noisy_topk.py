"""Noisy top-k: learned Gaussian noise on the logits, and two losses that even importance and load.

Paper      Shazeer et al. 2017, arXiv 1701.06538
Idea       Noise lets experts that are nearly chosen be tried; how likely it is that one is chosen has a gradient.
Rule       H = x W_g + eps softplus(x W_n) in training, x W_g in evaluation; S = the k largest of H; g = softmax over chosen H
           L = w_i CV^2(sum_t g_te) + w_l CV^2(sum_t Phi((clean_te - kth_excluding_te) / sigma_te))
Needs      nothing
Gives      a router with importance and load losses
Departs    sigma is kept above 0.01; evaluation has no load loss. Trait batch-in-training: fresh noise for each call
Checked    the load is the probability, by Monte Carlo; weights sum to 1
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.importance import Importance, squared_variation
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax


class NoisyLinear(nn.Module):
    """The gate. Leaves clean_TE and sigma_TE in ctx.notes for the load loss."""

    def __init__(self, site: Site, floor: float) -> None:
        super().__init__()
        self.gate, self.noise, self.floor = site.linear(site.num_experts), site.linear(site.num_experts), floor
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        clean_TE = self.gate(x_TD)
        if not ctx.training:
            return clean_TE
        sigma_TE = nn.functional.softplus(self.noise(x_TD)) + self.floor
        ctx.notes.update(clean_TE=clean_TE, sigma_TE=sigma_TE)
        return clean_TE + sigma_TE * torch.randn(clean_TE.shape, generator=ctx.rng, device=x_TD.device)


def load(clean_TE: Tensor, sigma_TE: Tensor, noisy_TE: Tensor, k: int) -> Tensor:
    """load_E: sum over tokens of the probability that an expert is among the k best under fresh noise on its own logit."""
    if k >= noisy_TE.shape[1]:
        return torch.ones_like(clean_TE).sum(0)
    best = noisy_TE.topk(k + 1, -1).values
    inside, outside = best[:, k : k + 1], best[:, k - 1 : k]  # k-th largest of the others: of those in, of those out
    threshold_TE = torch.where(noisy_TE > inside, inside, outside)
    return torch.special.ndtr((clean_TE - threshold_TE) / sigma_TE).sum(0)


class Load(nn.Module):
    """The load loss."""

    def __init__(self, weight: Scheduled, k: int) -> None:
        super().__init__()
        self.weight, self.k = read(weight), k

    def forward(self, decision: Decision) -> Tensor:
        notes = decision.ctx.notes
        load_E = load(notes["clean_TE"], notes["sigma_TE"], decision.logits_TE, self.k)
        return value_at(self.weight, decision.ctx.step) * squared_variation(load_E)


@method("layers.routers.noisy_topk", kind="router", fidelity="faithful", paper="1701.06538", traits=("batch-in-training",))
def noisy_topk(site: Site, *, importance: Scheduled = 0.1, load: Scheduled = 0.1, floor: float = 0.01) -> StagedRouter:
    """importance, load: weights of the losses. floor: least standard deviation of the noise."""
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=NoisyLinear(site, floor),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Combine("softmax"),
        losses={"importance": Importance(importance), "load": Load(load, site.top_k)},
    )
