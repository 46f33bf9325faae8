"""Compressed experts, trained: half of a token's experts become vectors while the whole model is fine-tuned.

Paper      He et al. 2025, arXiv 2503.00634
Idea       The vectors learn what the missing experts would have added, and the rest of the model learns to live with them.
Rule       CE = 1 at first; every weight of the model and CE are trained on the text's own loss; see the tap for the forward pass
Needs      nothing
Gives      the fine-tuned model, and the tap layers.taps.compressed_experts with its vectors for each layer
Departs    nothing; `vectors_only` leaves the model as it is and trains CE alone, which the paper does not
Checked    gradients reach the vectors of experts that were auxiliary, and no others; better than the main experts alone after equal training
"""

from __future__ import annotations

import torch
from torch import nn

from moestro.core.errors import InputError, UnsupportedModel
from moestro.core.method import method
from moestro.core.plans.compression import TapUse
from moestro.layers.taps.compressed_experts import NAMES
from moestro.layers.taps.compressed_experts import CompressedExperts as Tap
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome
from moestro.train.objectives.next_token import NextToken
from moestro.train.pretrained import Pretrained, opened
from moestro.train.tuned import Left, Tuning


class Vectors(nn.Module):
    """The objective, with CE of every layer as its parameters."""

    def __init__(self, student: Pretrained, main: int) -> None:
        super().__init__()
        self.inner, self.main = NextToken(), []
        self.layers = nn.ModuleList()
        for layer in student.model.layers:
            facts = layer.facts
            count = main or max(1, facts.top_k - facts.top_k // 2)
            if count >= facts.top_k:
                raise InputError(f"{count} main experts of {facts.top_k}", expected=f"1 to {facts.top_k - 1}")
            if facts.spec.weigh_input:
                raise UnsupportedModel(
                    f"the experts of this {student.model.facts.family} weigh their input", expected="another family"
                )
            widths = (facts.spec.d_model, facts.spec.d_expert, facts.spec.d_model)
            made = {name: nn.Parameter(torch.ones(facts.num_experts, width)) for name, width in zip(NAMES, widths, strict=True)}
            vectors = nn.ParameterDict(made)
            self.layers.append(vectors)
            self.main.append(count)
            layer.scaling = Tap(dict(vectors.items()), count)

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        return self.inner(module, batch, step, rng)


@method("train.tuning.compressed_experts", kind="tuning", fidelity="exact", paper="2503.00634")
def compressed_experts(student: Pretrained, teacher: Pretrained | None, *, main: int = 0, vectors_only: bool = False) -> Tuning:
    """main: experts of a token that run; 0: half of them. Raises InputError, UnsupportedModel."""
    objective = Vectors(student, main)
    if not vectors_only:
        opened(list(student.module.parameters()))

    def left() -> Left:
        taps, arrays = [], {}
        for i, (vectors, count) in enumerate(zip(objective.layers, objective.main, strict=True)):
            assert isinstance(vectors, nn.ParameterDict)
            taps.append((TapUse("layers.taps.compressed_experts", {"arrays": f"layer-{i}.", "main": count}),))
            arrays |= {f"layer-{i}.{name}": vectors[name].detach().numpy() for name in NAMES}
        return Left(tuple(taps), arrays)

    return Tuning(objective, finish=left)
