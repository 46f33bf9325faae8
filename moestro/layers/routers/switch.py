"""Switch: one expert per token, bounded buffers, one balance loss.

Paper      Fedus, Zoph, Shazeer 2021, arXiv 2101.03961
Idea       A single expert per token is enough if its probability multiplies its output, which trains the router.
Rule       p = softmax(x W^T), float32; e = argmax p; g = p_e, not renormalised; a token beyond its expert's
           C = ceil(factor T / E), in token order, is dropped (output 0); loss = alpha E sum_e f_e P_e, f before drops
           training only: the router's input is x * U(1 - jitter, 1 + jitter)
Needs      nothing; top_k of the configuration is not read: it is 1
Gives      a router with balance loss and capacity
Departs    initial weights follow the model's init_std. Trait batch: tokens of a batch compete for an expert's places
Checked    closed forms of capacity, drops and loss; no drops at factor E, and then equal to top-1
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site
from moestro.layers.stages import Combine, Linear, TopK, softmax
from moestro.layers.taps.capacity import Capacity


class JitteredLinear(Linear):
    """A linear gate whose input is multiplied by uniform noise in training."""

    def __init__(self, site: Site, jitter: float) -> None:
        super().__init__(site)
        self.jitter = jitter

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        if ctx.training and self.jitter:
            noise = torch.rand(x_TD.shape, generator=ctx.rng, device=x_TD.device)
            x_TD = x_TD * (1 + self.jitter * (2 * noise - 1))
        return super().forward(x_TD, ctx)


@method("layers.routers.switch", kind="router", fidelity="faithful", paper="2101.03961", traits=("batch",))
def switch(
    site: Site, *, capacity: float = 1.25, evaluate_capacity: float = 2.0, jitter: float = 0.0, balance: Scheduled = 0.01
) -> StagedRouter:
    """capacity: factor in training, evaluate_capacity: in evaluation, 0 drops nothing. balance: alpha."""
    return StagedRouter(
        score=JitteredLinear(site, jitter),
        normalise=softmax,
        select=TopK(1),
        combine=Combine("raw"),
        taps=[Capacity(site, capacity, evaluate_capacity)],
        losses={"balance": Balance(site, balance)},
    )
