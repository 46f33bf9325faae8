"""Rectified flow: predict the straight way from the data to noise.

Paper      Liu et al. 2022, arXiv 2209.03003; logit-normal times: Esser et al. 2024, arXiv 2403.03206; used by DiT-MoE, arXiv 2407.11633
Idea       The state moves on a line from a sample to noise; a model of its velocity draws samples by walking back.
Rule       t = sigmoid(u), u ~ N(0, 1); s_t = (1 - t) x + t n, n ~ N(0, I); loss = mean |v(s_t, t, class) - (n - x)|^2 + auxiliary losses
           the class is dropped with probability `unconditional`, for guidance
Needs      architecture `dit`; samples whose last character is the class (`samples:digits`)
Gives      the loss, its parts; held out: the same error, with all classes
Departs    nothing
Checked    the loss of the true velocity is 0; walking back along it ends in the sample
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.architectures.dit import DiT
from moestro.layers.decoder import Output
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome
from moestro.train.objectives.label import samples


def draw(
    module: DiT, label_B: Tensor, length: int, *, steps: int = 50, guidance: float = 1.0, rng: torch.Generator | None = None
) -> Tensor:
    """state_BTC of new samples with these classes (-1: any): Euler steps from noise. guidance: 1 uses the class as it is."""
    tokens_BT = torch.full((len(label_B), length), module.levels[0] if module.levels else 0)
    state = torch.randn(module.state_of(tokens_BT).shape, generator=rng)
    with torch.no_grad():
        for i in range(steps, 0, -1):
            time_B = torch.full((len(label_B),), i / steps)
            velocity = _velocity(module, tokens_BT, state, time_B, label_B, 0, rng).logits_BTV
            if guidance != 1.0:
                free = _velocity(module, tokens_BT, state, time_B, torch.full_like(label_B, -1), 0, rng).logits_BTV
                velocity = free + guidance * (velocity - free)
            state = state - velocity / steps
    return state


def _velocity(
    module: nn.Module, tokens_BT: Tensor, state: Tensor, time_B: Tensor, label_B: Tensor, step: int, rng: torch.Generator | None
) -> Output:
    dropped_T = (label_B < 0).repeat_interleave(tokens_BT.shape[1])
    given = {"state_BTC": state, "time_B": time_B, "label_B": label_B, "unconditional_T": dropped_T}
    return module(tokens_BT, step=step, rng=rng, given=given)


@method("train.objectives.rectified_flow", kind="objective", fidelity="faithful", paper="2209.03003")
class RectifiedFlow:
    """unconditional: share of samples whose class is dropped in training."""

    measures = ("loss",)

    def __init__(self, *, unconditional: float = 0.1) -> None:
        if not 0 <= unconditional <= 1:
            raise InputError(f"unconditional is {unconditional}", expected="a share of 1")
        self.unconditional = unconditional

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        error_B, output = self._errors(module, batch, step, rng, self.unconditional)
        task = error_B.mean()
        loss = task + sum(output.losses.values(), task.new_zeros(()))
        return Outcome(loss, {"task": task, **output.losses}, (output,))

    def held_out(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, int]:
        error_B, _ = self._errors(module, batch, step, rng, 0.0)
        return error_B.sum()[None], len(error_B)

    def _errors(
        self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator, unconditional: float
    ) -> tuple[Tensor, Output]:
        if not hasattr(module, "state_of"):
            raise InputError(
                "a model without a state to denoise", expected="the architecture dit", fix="--set model.architecture=dit"
            )
        inputs_BT, label_B = samples(batch)
        data: Tensor = module.state_of(inputs_BT)  # type: ignore[operator,union-attr]
        noise = torch.randn(data.shape, generator=rng)
        time_B = torch.randn(len(data), generator=rng).sigmoid()
        label_B = label_B.masked_fill(torch.rand(len(data), generator=rng) < unconditional, -1)
        t = time_B[:, None, None]
        output = _velocity(module, inputs_BT, (1 - t) * data + t * noise, time_B, label_B, step, rng)
        return (output.logits_BTV.float() - (noise - data)).square().mean((1, 2)), output
