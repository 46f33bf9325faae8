"""Consistency: two passes with independent draws of experts must predict alike.

Paper      Zuo et al. 2021, THOR, arXiv 2110.04260
Idea       Experts drawn at random become exchangeable when the model is charged for what the draw changes.
Rule       loss = CE(p) + CE(q) + alpha mean over tokens of (KL(p|q) + KL(q|p)) / 2, p and q the predictions of the two passes
           plus the mean of both passes' auxiliary losses
Needs      a module with something random in it (the router `thor`, noisy gates)
Gives      the loss, and its parts as metrics; a step costs two forward passes
Departs    a mean over tokens where the paper has sums, so that alpha does not depend on the batch
Checked    0 and no effect for equal draws; symmetric and not negative; equal to the sum over the vocabulary written out
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, cross_entropy, run


def disagreement(logits_NV: Tensor, other_NV: Tensor) -> Tensor:
    """Mean symmetric KL divergence of two predictions, in nats, float32."""
    a, b = logits_NV.float().log_softmax(-1), other_NV.float().log_softmax(-1)
    return 0.5 * ((a.exp() - b.exp()) * (a - b)).sum(-1).mean()


@method("train.objectives.consistency", kind="objective", fidelity="faithful", paper="2110.04260")
class Consistency:
    """alpha: weight of the disagreement. smoothing: label smoothing, as a share of probability."""

    def __init__(self, *, alpha: float = 1.0, smoothing: float = 0.1) -> None:
        if alpha < 0:
            raise InputError(f"alpha is {alpha}", expected="0 or more")
        self.alpha, self.smoothing = alpha, smoothing

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        first, second = run(module, batch, step, rng), run(module, batch, step, rng)
        tasks = [cross_entropy(output.logits_BTV, batch, smoothing=self.smoothing) for output in (first, second)]
        apart = disagreement(first.logits_BTV.flatten(0, 1), second.logits_BTV.flatten(0, 1))
        auxiliary = {name: (loss + second.losses[name]) / 2 for name, loss in first.losses.items()}
        loss = tasks[0] + tasks[1] + self.alpha * apart + sum(auxiliary.values(), apart.new_zeros(()))
        return Outcome(loss, {"task": (tasks[0] + tasks[1]) / 2, "disagreement": apart, **auxiliary}, (first, second))
