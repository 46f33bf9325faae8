"""OpenMoE: top-2 with fixed buffers that fill up along the sequence.

Paper      Xue et al. 2024, arXiv 2402.01739
Idea       A plain, reproducible recipe, and what it teaches: under a fixed capacity it is the end of a sequence that is dropped.
Rule       p = softmax(x W^T); S = the K largest; g = p; C = ceil(factor T_s K / E) places of an expert in each sequence of T_s tokens, taken in
           order of position, a token's choices together; what finds no place is skipped; loss = alpha E sum_e f_e P_e + z mean (logsumexp z)^2
Needs      sequences of the tokens, else all are one. The rest of the recipe is configuration: experts in every sixth layer
           (dense_layers names the others), an always-on feed-forward beside them (d_shared), and for the first part of training the
           objective `mixed_denoising`; the recipe `openmoe` is all of it, small
Gives      a router with balance loss, z-loss and capacity
Departs    capacities and z are not confirmed; the paper's group of tokens that shares buffers is taken to be the sequence. Raw weights are our
           reading
Checked    an expert keeps min(load, C) of a sequence; a token loses its place only to C earlier ones; at factor E / K none is dropped
"""

from __future__ import annotations

import math

import torch

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.losses.balance import Balance
from moestro.layers.losses.z import ZLoss
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK, softmax
from moestro.layers.taps.capacity import Capacity, rank


class SequenceCapacity(Capacity):
    """Capacity within each sequence, in order of position."""

    def forward(self, routing: Routing, ctx: RouteContext) -> Routing:
        factor = self.train_factor if ctx.training else self.evaluate_factor
        if not factor or ctx.sequence_T is None or not routing.tokens:
            return super().forward(routing, ctx)
        row_T, length_B = torch.as_tensor(ctx.sequence_T).unique(return_inverse=True, return_counts=True)[1:]
        apart_TK = routing.experts_TK + row_T[:, None] * self.experts
        apart_TK = apart_TK.masked_fill(routing.experts_TK < 0, -1)
        limit_B = [math.ceil(factor * n * routing.slots / self.experts - 1e-9) for n in length_B.tolist()]
        over_TK = (
            rank(apart_TK, len(limit_B) * self.experts, "token") >= torch.tensor(limit_B, device=row_T.device)[row_T][:, None]
        )
        return routing.drop(over_TK, renormalise=False)


@method("layers.routers.openmoe", kind="router", fidelity="adapted", paper="2402.01739")
def openmoe(
    site: Site,
    *,
    capacity: float = 1.25,
    evaluate_capacity: float = 2.0,
    combine: str = "raw",
    balance: Scheduled = 0.01,
    z: Scheduled = 1e-4,
) -> StagedRouter:
    """capacity, evaluate_capacity: factors, 0 drops nothing. combine: see `layers.stages.Combine`. balance, z: weights of the losses."""
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Combine(combine),
        taps=[SequenceCapacity(site, capacity, evaluate_capacity, order="token")],
        losses={"balance": Balance(site, balance), "z": ZLoss(z)},
    )
