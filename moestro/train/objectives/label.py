"""Label: predict the last character of each sample from the ones before it.

Paper      the usual objective of classifiers
Idea       One sequence is one sample: its inputs, its label and the end token; only the label is predicted, so a model may read all inputs.
Rule       loss = - mean over samples of log p(label | inputs) at the last input + sum of the auxiliary losses; the label is not shown
           p is over the whole vocabulary; `smoothing` spreads a share of the target evenly over it
Needs      data.length = the inputs + 2; sources `samples:NAME`
Gives      the loss, its parts and the accuracy; held out: loss and accuracy, by domain (task)
Departs    nothing
Checked    equal to the loss written out; the label is not read
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.layers.decoder import Output
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome


def samples(batch: Batch) -> tuple[Tensor, Tensor]:
    """(inputs_BT, label_B). Raises InputError when a sequence is not one sample."""
    ends = batch.tokens_BT[:, -1]
    if batch.tokens_BT.shape[1] < 3 or bool((ends != ends[0]).any()) or bool((batch.tokens_BT[:, :-1] == ends[0]).any()):
        raise InputError(
            f"sequences of {batch.tokens_BT.shape[1]} tokens are not one sample each",
            expected="data.length = the sample's inputs + 2, for the label and the end",
            fix="66 for samples:digits, 6 for samples:characters",
        )
    return batch.tokens_BT[:, :-2], batch.tokens_BT[:, -2]


def forward(module: nn.Module, inputs_BT: Tensor, batch: Batch, step: int, rng: torch.Generator) -> Output:
    """One pass over the inputs, with each token's domain."""
    domain_T = batch.domain_B.repeat_interleave(inputs_BT.shape[1])
    return module(inputs_BT, step=step, rng=rng, given={"domain_T": domain_T})


@method("train.objectives.label", kind="objective", fidelity="exact")
class Label:
    """smoothing: label smoothing, as a share of probability."""

    measures = ("loss", "accuracy")

    def __init__(self, *, smoothing: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise InputError(f"smoothing is {smoothing}", expected="a share below 1")
        self.smoothing = smoothing

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        inputs_BT, label_B = samples(batch)
        output = forward(module, inputs_BT, batch, step, rng)
        logits_BV = output.logits_BTV[:, -1].float()
        task = functional.cross_entropy(logits_BV, label_B, label_smoothing=self.smoothing)
        right = (logits_BV.argmax(-1) == label_B).float().mean()
        loss = task + sum(output.losses.values(), task.new_zeros(()))
        return Outcome(loss, {"task": task, "accuracy": right, **output.losses}, (output,))

    def held_out(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, int]:
        inputs_BT, label_B = samples(batch)
        logits_BV = forward(module, inputs_BT, batch, step, rng).logits_BTV[:, -1].float()
        loss = functional.cross_entropy(logits_BV, label_B, reduction="sum")
        return torch.stack((loss, (logits_BV.argmax(-1) == label_B).sum())), len(label_B)
