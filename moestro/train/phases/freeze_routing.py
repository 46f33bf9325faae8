"""Freeze routing: from a given share of the steps on, routers with two stages route by the second.

Paper      Dai et al. 2022, StableMoE, arXiv 2204.08396
Idea       The routing is learned in the first tenth of training, then it stays.
Rule       at step round(at * steps): stage 2 begins in every router that has stages, for good
Needs      the router `stable_moe`
Gives      'stage' for the log: 1 or 2
Departs    nothing
Checked    no token changes its expert afterwards; a run resumed around the step does the same
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.routers.stable_moe import TwoRouters
from moestro.layers.site import require


@method("train.phases.freeze_routing", kind="training schedule", fidelity="exact", paper="2204.08396")
class FreezeRouting:
    """at: share of the steps that stage 1 takes."""

    def __init__(self, *, at: float = 0.1) -> None:
        require(0 <= at <= 1, f"at {at}", "0 to 1")
        self.at = at

    def __call__(self, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, steps: int) -> Mapping[str, float]:
        routers = [m for m in module.modules() if isinstance(m, TwoRouters)]
        if not routers:
            raise InputError("no router with two stages", expected="the router stable_moe", fix="model.router=stable_moe")
        settled = step >= round(self.at * steps)
        for router in routers:
            router.settled.fill_(settled)
        return {"stage": 1.0 + settled}
