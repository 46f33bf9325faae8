"""MoE++: experts that cost nothing beside the feed-forward ones, and a gate that sees the layer before.

Paper      Jin et al. 2024, arXiv 2410.07348
Idea       Zero, copy and constant experts let easy tokens skip work; the previous layer's logits make successive choices agree.
Rule       z_l = W_l x + G_l z_{l-1}, no second term in the first layer; p = softmax z; S = the K largest; p of a zero expert is set to 0,
           then g = p over its sum on S. W_l may be a two-layer tanh net D -> 8E -> E
           loss = beta sum_e eta_e f_e P_e; f_e = c_e / T; eta 1 for feed-forward experts, tau for others
           capacity of N pairs, in token order and in training only: gamma tau N / (tau N_F + N_Z) for a feed-forward expert, for others
           gamma N / (tau N_F + N_Z)
Needs      special experts of the configuration: {"name": "constant", "count": 2}, "copy", "zero"
Gives      a router with balance loss and capacity; leaves its logits in ctx.carry
Departs    G starts at zero, as its start is not in the release. N counts the pairs: the paper's T would drop half of them
           at K = 2. Several zero experts are safe. Trait batch-in-training: tokens compete for places
Checked    zero beside e is e alone; copy beside zero is the input; G = 0 is the plain gate; tau 1: the plain balance loss over E; the
           capacities sum to gamma N
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.experts import FFN
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.routers.adamoe import AmongOthers
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import TopK, softmax
from moestro.layers.taps.capacity import rank

STATE = "moe_plus_plus"


class Residual(nn.Module):
    """The gate; in all layers but the first, plus a linear map of the logits of the layer before."""

    def __init__(self, site: Site, deep: bool) -> None:
        super().__init__()
        e = site.num_experts
        if deep:
            self.own: nn.Module = nn.Sequential(site.linear(8 * e), nn.Tanh(), site.linear(e, 8 * e))
        else:
            self.own = site.linear(e)
        self.before = site.linear(e, e) if site.layer else None
        if self.before is not None:
            nn.init.zeros_(self.before.weight)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE = self.own(x_TD)
        if self.before is not None and STATE in ctx.carry:
            logits_TE = logits_TE + self.before(ctx.carry[STATE])
        ctx.carry[STATE] = logits_TE
        return logits_TE


class SizedCapacity(nn.Module):
    """A tap on the routing: in training, each expert takes its share of factor * pairs, in token order. size_E: shares, of any scale."""

    point = "routing"

    def __init__(self, size_E: Tensor, factor: float) -> None:
        super().__init__()
        self.share, self.factor = [float(size / size_E.sum()) for size in size_E], factor

    def limits(self, pairs: int) -> list[int]:
        """C of each expert."""
        return [math.ceil(self.factor * share * pairs - 1e-6) for share in self.share]

    def forward(self, routing: Routing, ctx: RouteContext) -> Routing:
        if not ctx.training or not self.factor:
            return routing
        ids_TK = routing.experts_TK
        limit_E = torch.tensor(self.limits(ids_TK.numel()), device=ids_TK.device)
        over = rank(ids_TK, len(self.share), "token") >= limit_E[ids_TK.clamp_min(0)]
        return routing.drop(over & (ids_TK >= 0), renormalise=False)


def costed(site: Site, tau: float) -> Tensor:
    """1 for feed-forward experts, tau for others."""
    return torch.tensor([1.0 if kind == FFN else tau for kind in site.bank().kinds])


@method("layers.routers.moe_plus_plus", kind="router", fidelity="adapted", paper="2410.07348", traits=("batch-in-training",))
def moe_plus_plus(
    site: Site, *, tau: float = 0.75, balance: Scheduled = 0.01, capacity: float = 1.1, deep: bool = False
) -> StagedRouter:
    """tau: of cost-free experts in loss and capacity, smaller is faster. balance: beta. capacity: gamma, 0: no limit. deep: the tanh net."""
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    require(tau > 0 and capacity >= 0, f"tau {tau}, capacity {capacity}", "above 0, and at least 0")
    eta_E = costed(site, tau)
    # The module's loss has a factor E that this paper's has not.
    loss = Balance(site, balance, convention="tokens", weight_E=eta_E / site.num_experts)
    return StagedRouter(
        score=Residual(site, deep),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=AmongOthers(site),
        taps=[SizedCapacity(costed(site, 1 / tau), capacity)],
        losses={"balance": loss},
    )
