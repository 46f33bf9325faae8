"""Adaptive weight: one auxiliary loss is charged more while it does not fall.

Paper      Song et al. 2025, BlockFFN, arXiv 2507.08771
Idea       No fixed weight of the chunk loss fits a whole run: raise it when sparsity stalls, lower it while sparsity comes by itself.
Rule       loss = CE + factor L + the other auxiliary losses; factor 1 for `warmup` steps; then at every `every`-th step its target becomes
           min(most, target r), r = mean of L in the last window / in the one before, at least `least_rise` where above 1;
           the factor goes there in a straight line over the next window
Needs      a model with an auxiliary loss of that name, such as chunk_sparsity of the router `blockffn`, its own weight constant
Gives      the loss, its parts and the factor as metrics; the state is saved in buffers, and its means are over all processes
Departs    nothing
Checked    the controller on given series; constant through warm-up; the cap; a resumed run goes on with the same factors
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.reduce import sum_over_ranks
from moestro.layers.site import require
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, cross_entropy, run

_SUM, _COUNT, _BEFORE, _START, _TARGET, _WINDOW = range(6)


@method("train.objectives.adaptive", kind="objective", fidelity="faithful", paper="2507.08771")
class Adaptive(nn.Module):
    """charge: name of the loss. warmup, every: in optimiser steps. most: cap of the factor. least_rise: smallest rise."""

    state: Tensor

    def __init__(
        self,
        *,
        charge: str = "chunk_sparsity",
        warmup: int = 1000,
        every: int = 100,
        most: float = 4.0,
        least_rise: float = 1.025,
    ) -> None:
        super().__init__()
        require(warmup >= 0 and every >= 1, f"warmup {warmup}, every {every} steps", "at least 0 and 1")
        require(most >= 1 and least_rise >= 1, f"most {most}, least_rise {least_rise}", "at least 1")
        self.charge, self.warmup, self.every, self.most, self.least_rise = charge, warmup, every, most, least_rise
        # The window's sum and count, the mean of the window before (-1: none), the factor's start and target, the window's number.
        self.register_buffer("state", torch.tensor([0.0, 0.0, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64))

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        output = run(module, batch, step, rng)
        if self.charge not in output.losses:
            raise InputError(
                f"the model has no auxiliary loss {self.charge!r}",
                expected="one of " + ", ".join(sorted(output.losses)) if output.losses else "a model with auxiliary losses",
                fix="set objective.charge, or a router that has it, such as blockffn",
            )
        factor = self.factor(output.losses[self.charge], step)
        task = cross_entropy(output.logits_BTV, batch)
        others = [loss for name, loss in output.losses.items() if name != self.charge]
        loss = task + factor * output.losses[self.charge] + sum(others, task.new_zeros(()))
        return Outcome(loss, {"task": task, **output.losses, "factor": task.new_tensor(factor)}, (output,))

    @torch.no_grad()
    def factor(self, value: Tensor, step: int) -> float:
        """The factor at a step, after taking in one micro-batch's value of the loss."""
        if step // self.every > int(self.state[_WINDOW]):
            self._close(step)
        self.state[:2] += sum_over_ranks(torch.stack((value.detach().double(), torch.ones((), dtype=torch.float64))))
        start, target = self.state[_START].item(), self.state[_TARGET].item()
        return start + (target - start) * (step % self.every) / self.every

    def _close(self, step: int) -> None:
        """A new window begins: move the target by what the last one did against the one before it."""
        mean, before = float(self.state[_SUM] / self.state[_COUNT].clamp_min(1)), self.state[_BEFORE].item()
        target = self.state[_TARGET].item()
        self.state[_START] = target
        if step >= self.warmup and before > 0:
            ratio = mean / before
            self.state[_TARGET] = min(self.most, target * (max(ratio, self.least_rise) if ratio > 1 else ratio))
        self.state[:3] = torch.tensor([0.0, 0.0, mean], dtype=torch.float64)
        self.state[_WINDOW] = step // self.every
