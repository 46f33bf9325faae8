"""Next token: cross-entropy and the model's own auxiliary losses.

Paper      the usual objective of language models
Idea       One forward pass; the balance and other losses come with the model, already weighted.
Rule       loss = - mean over tokens of log p(next token) + sum of the auxiliary losses
Needs      a module with logits and losses
Gives      the loss, and its parts as metrics
Departs    nothing
Checked    equal to the loss written out; a memorised text ends near 0
"""

from __future__ import annotations

import torch
from torch import nn

from moestro.core.method import method
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, cross_entropy, run


@method("train.objectives.next_token", kind="objective", fidelity="exact")
class NextToken:
    """smoothing: label smoothing, as a share of probability."""

    def __init__(self, *, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        output = run(module, batch, step, rng)
        task = cross_entropy(output.logits_BTV, batch, smoothing=self.smoothing)
        loss = task + sum(output.losses.values(), task.new_zeros(()))
        return Outcome(loss, {"task": task, **output.losses}, (output,))
