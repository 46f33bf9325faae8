"""Single expert: while switched on, every token goes to expert 0 alone.

Paper      Nie et al. 2021, EvoMoE, arXiv 2112.14397
Idea       A mixture can begin as a dense model: one expert is trained, then copied into all.
Rule       while on: experts_TK = 0, weight 1, in training and in evaluation; else nothing
Needs      the phase `diversify`, which switches it on and off; it is off otherwise
Gives      a routing of one slot; the switch is a saved buffer
Departs    nothing
Checked    on: the block is expert 0; off: the routing is untouched
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.site import Site


class SingleExpert(nn.Module):
    """The tap; `on` is its switch."""

    point = "routing"
    on: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("on", torch.zeros((), dtype=torch.bool))

    def forward(self, routing: Routing, ctx: RouteContext) -> Routing:
        if not bool(self.on):
            return routing
        only_TK = torch.zeros_like(routing.experts_TK[:, :1])
        return replace(routing, experts_TK=only_TK, weights_TK=torch.ones_like(routing.weights_TK[:, :1]))


@method("layers.taps.single_expert", kind="tap", fidelity="exact", paper="2112.14397")
def single_expert(site: Site) -> SingleExpert:
    """Off until a phase switches it on."""
    return SingleExpert()
