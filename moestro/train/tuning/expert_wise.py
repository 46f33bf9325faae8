"""MoE-Pruner's recovery: every expert learns to answer as it did before, and zeros stay zeros.

Paper      Xie et al. 2024, arXiv 2410.12013
Idea       The pruned expert and its original see the same tokens; matching them one by one tells each expert what it lost.
Rule       loss = cross-entropy + lambda * sum over layers and experts of MSE(E_original(h), E_pruned(h)); h is the student's own;
           lambda = cross-entropy / that sum at the first step; weights that are 0 at the beginning stay 0
Needs      teacher
Gives      the model with new weights everywhere but in embedding and head, its zeros where they were
Departs    embedding and head are left as they are; the paper trains every weight. An expert's mean is over the tokens it was given
Checked    the zeros are the same afterwards; the sum is 0 against itself, and falls when half of the weights are zeros
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.models.experts import feed_forward
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, cross_entropy, run
from moestro.train.pretrained import Pretrained, opened
from moestro.train.tuned import Tuning


class ExpertWise(nn.Module):
    """The objective; `weight`, lambda, is set at the first step and saved."""

    weight: Tensor

    def __init__(self, student: Pretrained, teacher: Pretrained) -> None:
        super().__init__()
        self.pair: Any = (student, teacher)  # in a tuple: their weights are not this module's
        self.register_buffer("weight", torch.zeros(()))

    def distance(self) -> Tensor:
        """The sum over the experts that saw tokens in the student's last pass."""
        student, teacher = self.pair
        total = torch.zeros(())
        for layer, (x_TD, routing) in sorted(student.watched.items()):
            spec, seen = student.model.layers[layer].facts.spec, student.model.layers[layer]
            pairs, h_TD = routing.pairs(seen.experts.num), x_TD.detach()
            starts = pairs.starts_E1.tolist()
            for e, (a, b) in enumerate(itertools.pairwise(starts)):
                if a == b:
                    continue
                h_nD = h_TD[pairs.token_N[a:b]]
                with torch.no_grad():
                    want_nD = feed_forward(h_nD, teacher.model.weights(ExpertKey(layer, e)), spec)
                total = total + functional.mse_loss(feed_forward(h_nD, seen.experts.weights(e), spec), want_nD)
        return total

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        output = run(module, batch, step, rng)
        task, far = cross_entropy(output.logits_BTV, batch), self.distance()
        if not self.weight:
            self.weight.fill_(float(task.detach() / far.detach().clamp_min(1e-12)))
        return Outcome(task + self.weight * far, {"task": task, "experts": far}, (output,))


@method("train.tuning.expert_wise", kind="tuning", needs=("teacher",), fidelity="adapted", paper="2410.12013")
def expert_wise(student: Pretrained, teacher: Pretrained) -> Tuning:
    """Raises InputError when the experts are not the original's."""
    mine, theirs = ([la.num_experts for la in one.model.facts.layers] for one in (student, teacher))
    if mine != theirs:
        raise InputError(
            f"the model has {mine[0]} experts in a layer, the original {theirs[0]}",
            expected="the same experts, with zeros",
            fix="use router_norms or low_rank after experts were removed or merged",
        )
    outside = {
        id(p) for part in ("get_input_embeddings", "get_output_embeddings") for p in getattr(student.module, part)().parameters()
    }
    trained = opened([p for p in student.module.parameters() if id(p) not in outside])
    for parameter in trained:
        if parameter.ndim >= 2:
            parameter.register_hook(_Masked(parameter.detach() != 0))
    return Tuning(ExpertWise(student, teacher))


class _Masked:
    """Keeps a gradient away from weights that are 0, which neither Adam nor decay then moves."""

    def __init__(self, there: Tensor) -> None:
        self.there = there

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.there
