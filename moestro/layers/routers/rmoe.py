"""RMoE: a recurrent cell over the layers carries what was routed before into each layer's routing.

Paper      Qiu et al. 2024, arXiv 2408.06793
Idea       Layers route as if they knew nothing of each other. A state per token that passes through all routers lets them agree, and
           gives the gates a gradient path of their own.
Rule       u = x W1_l^T; h_l = GRU(u, h_{l-1}), one cell for all layers, h before the first MoE layer 0; z = h_l W2_l^T;
           p = softmax z; S = the K largest; g renormalised; loss = alpha E sum_e f_e P_e, f_e = c_e / T
Needs      nothing. The paper's optional always-on expert at equal parts is the block `halved`
Gives      a router with balance loss; leaves h in ctx.carry; the cell is shared by all layers and saved once
Departs    nothing. Biases of the cell start at zero
Checked    the cell written out; L (p D + E p) + 6 p^2 + 6 p parameters; a token's routing depends on that token only; gradient from a
           later layer's routing reaches an earlier gate
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax

STATE = "rmoe"


class Recurrent(nn.Module):
    """project to p, one step of the shared cell, head to E."""

    def __init__(self, site: Site, width: int) -> None:
        super().__init__()
        self.project = site.linear(width)
        self.cell: nn.GRUCell = site.shared("rmoe.cell", lambda: _cell(width, site.init_std))
        self.head = site.linear(site.num_experts, width)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        before_TP = ctx.carry.get(STATE)
        ctx.carry[STATE] = self.cell(self.project(x_TD), before_TP)
        return self.head(ctx.carry[STATE])


def _cell(width: int, std: float) -> nn.GRUCell:
    cell = nn.GRUCell(width, width)
    for name, parameter in cell.named_parameters():
        torch.nn.init.normal_(parameter, std=std) if "weight" in name else torch.nn.init.zeros_(parameter)
    return cell


@method("layers.routers.rmoe", kind="router", fidelity="faithful", paper="2408.06793")
def rmoe(site: Site, *, width: int = 128, balance: Scheduled = 0.001) -> StagedRouter:
    """width: p, of the recurrent state (paper 128, code 256). balance: alpha."""
    require(width >= 1, f"width {width}", "at least 1")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Recurrent(site, width),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Combine("renormalised"),
        losses={"balance": Balance(site, balance, convention="tokens")},
    )
