"""Routers and norms: a short distillation of the few weights that decide where tokens go and how large they are.

Paper      none; the recovery that follows merging and pruning in arXiv 2310.01334, cut to the cheapest weights
Idea       After experts went, what is left can do most of the work; what is wrong is who is asked and at what scale.
Rule       loss = mix * KL(teacher || student) T^2 + (1 - mix) * cross-entropy; only routers and norms are trained
Needs      teacher
Gives      the model with new routers and norms, every other weight bit for bit
Departs    nothing
Checked    no other tensor changes; brings a pruned model nearer to the original than it was
"""

from __future__ import annotations

import torch
from torch import nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, cross_entropy, run
from moestro.train.pretrained import Pretrained, opened
from moestro.train.tuned import Tuning, distance, taught


class Distil:
    """The objective. mix: weight of the teacher beside the text."""

    def __init__(self, teacher: Pretrained, mix: float, temperature: float) -> None:
        if not 0 <= mix <= 1 or temperature <= 0:
            raise InputError(f"mix {mix:g}, temperature {temperature:g}", expected="a share from 0 to 1, and above 0")
        self.teacher, self.mix, self.temperature = teacher, mix, temperature

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        output = run(module, batch, step, rng)
        task = cross_entropy(output.logits_BTV, batch)
        far = distance(output.logits_BTV, taught(self.teacher, batch), self.temperature)
        return Outcome(self.mix * far + (1 - self.mix) * task, {"task": task, "distance": far}, (output,))


@method("train.tuning.router_norms", kind="tuning", needs=("teacher",), fidelity="exact", paper="2310.01334")
def router_norms(student: Pretrained, teacher: Pretrained, *, mix: float = 0.9, temperature: float = 1.0) -> Tuning:
    """Raises InputError."""
    opened(student.norms_and_routers())
    return Tuning(Distil(teacher, mix, temperature), rate=1e-3)
