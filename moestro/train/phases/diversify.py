"""Diversify: one expert is trained first, then copied into all, each copy perturbed.

Paper      Nie et al. 2021, EvoMoE, arXiv 2112.14397
Idea       Experts and gate that both start at random mislead each other. Experts that start from one trained expert are all useful at once,
           and what is perturbed in each gives the gate something to choose by.
Rule       until step round(at * steps) every token goes to expert 0; then every expert gets its weights, of which a random share `mask` is set to 0 in
           each, plus noise times their standard deviation; the optimiser's state of the experts starts anew
Needs      stacked experts (or the bank `sublayers`), and the tap `single_expert` on every router; `evomoe` has it
Gives      'stage' for the log: 1 or 2
Departs    the perturbation is from memory. Biases and norms are copied without it
Checked    without perturbation the block is expert 0 for any weights that sum to 1; the share of zeros; a run resumed around the step does the same
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.banks.sublayers import Sublayers
from moestro.layers.block import MoEBlock
from moestro.layers.experts import ExpertBank, Joined, Stacked
from moestro.layers.site import require
from moestro.layers.taps.single_expert import SingleExpert


@method("train.phases.diversify", kind="training schedule", fidelity="adapted", paper="2112.14397")
class Diversify:
    """at: share of the steps with a single expert. mask: share of each copy's weights set to 0. noise: in standard deviations. seed: of both."""

    def __init__(self, *, at: float = 0.1, mask: float = 0.1, noise: float = 0.0, seed: int = 0) -> None:
        require(0 <= at <= 1, f"at {at}", "0 to 1")
        require(0 <= mask < 1 and noise >= 0, f"mask {mask}, noise {noise}", "0 to below 1, and 0 or more")
        self.at, self.mask, self.noise, self.seed = at, mask, noise, seed

    def __call__(self, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, steps: int) -> Mapping[str, float]:
        turn = round(self.at * steps)
        switches = [m for m in module.modules() if isinstance(m, SingleExpert)]
        blocks = [m for m in module.modules() if isinstance(m, MoEBlock)]
        if not blocks or len(switches) < len(blocks):
            raise InputError(
                f"{len(switches)} routers with the tap single_expert for {len(blocks)} MoE blocks",
                expected="one each",
                fix='model.router=evomoe, or model.taps=["single_expert"]',
            )
        for switch in switches:
            switch.on.fill_(step < turn)
        if step == turn:
            # A bank that several layers share is copied once.
            for number, bank in enumerate(dict.fromkeys(bank for block in blocks for bank in copied(block.experts))):
                self.spread(bank, torch.Generator().manual_seed(self.seed * 100_003 + number), optimiser)
        return {"stage": 1.0 + (step >= turn)}

    @torch.no_grad()
    def spread(self, bank: ExpertBank, g: torch.Generator, optimiser: torch.optim.Optimizer) -> None:
        """Give every expert of a bank expert 0's weights, perturbed."""
        for parameter in bank.parameters():
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
            if parameter.ndim >= 3:
                parameter.add_(self.noise * parameter[0].std() * torch.randn(parameter.shape, generator=g))
                parameter.mul_(torch.rand(parameter.shape, generator=g) >= self.mask)
            optimiser.state.pop(parameter, None)


def copied(bank: ExpertBank) -> Iterator[ExpertBank]:
    """The one bank of feed-forward experts inside, without the special ones. Raises InputError for what cannot be copied."""
    found = [part for part in (bank.banks if isinstance(bank, Joined) else [bank]) if "ffn" in part.kinds]  # type: ignore[operator]
    if len(found) != 1 or not isinstance(found[0], Stacked | Sublayers):
        raise InputError(
            f"experts of {', '.join(type(part).__name__ for part in found)}",
            expected="one bank of experts of one shape",
            fix="model.experts=stacked",
        )
    yield found[0]
