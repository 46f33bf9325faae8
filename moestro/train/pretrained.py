"""A Hugging Face MoE model as the loop trains it, and the way back: its trained weights in a checkpoint of the same family.

Dropout and router noise stay off. Shapes: B sequences, T tokens of one, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.routing import Routing
from moestro.layers.block import Output
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import Stacked
from moestro.models.families.resize import is_router
from moestro.models.layout import Layout, Part
from moestro.models.live import renamer, seams
from moestro.models.open import Model
from moestro.models.parts import FLOATS, stored, to_part
from moestro.models.writer import Edits, Made, edit_checkpoint


class Pretrained(nn.Module):
    """`model` in float32 with every parameter frozen; a method of kind 'tuning' opens what it trains.

    watched: routings and inputs of the last forward pass, (x_TD, routing) by MoE layer, T over all sequences of the batch.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module, self.model = model.module, model
        self.watched: dict[int, tuple[Tensor, Routing]] = {}
        self.requires_grad_(False)
        for layer in model.layers:
            layer.watch(self._see)

    def _see(self, ordinal: int, x_TD: Tensor, routing: Routing, y_TD: Tensor) -> None:
        self.watched[ordinal] = x_TD, routing

    def train(self, mode: bool = True) -> Pretrained:
        """The model inside stays in evaluation mode."""
        self.training = mode
        self.module.eval()
        return self

    def controllers(self) -> list[Any]:
        """None: a pretrained model brings no balance of its own."""
        return []

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """logits_BTV."""
        self.watched.clear()
        return self.module(input_ids=tokens_BT, use_cache=False).logits

    def forward(self, tokens_BT: Tensor, *, step: int = 0, rng: Any = None, given: Any = None) -> Output:
        logits_BTV = self.logits(tokens_BT)
        seen = [self.watched[i][1] for i in sorted(self.watched)]
        return Output(logits_BTV, {}, tuple(seen) if all(r.logits_TE is not None for r in seen) else ())

    def norms_and_routers(self) -> list[nn.Parameter]:
        """Every norm's weights, and what belongs to the routers."""
        found = []
        for name, parameter in self.module.named_parameters():
            if "norm" in name.lower() or (is_router(name) and self._moe(name)):
                found.append(parameter)
        return found

    def _moe(self, name: str) -> bool:
        indices = {str(layer.facts.index) for layer in self.model.layers}
        words = name.split(".")
        return "layers" in words and words[words.index("layers") + 1] in indices

    def experts(self) -> list[nn.Parameter]:
        """Every expert's matrices and biases."""
        return [p for layer in self.model.layers for p in layer._seam.experts.parameters(recurse=False)]

    def matrices(self) -> list[tuple[nn.Module, str]]:
        """Linear maps outside experts and routers, as (module, name of the parameter): attention, shared experts, dense layers."""
        inside = {id(m) for layer in self.model.layers for m in layer._seam.experts.modules()}
        return [
            (module, "weight")
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear) and id(module) not in inside and not is_router(f"{name}.weight")
            and module is not self.module.get_output_embeddings()
        ]  # fmt: skip


def opened(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The parameters, from now on trained."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def save(trained: Pretrained, names: set[str], out: str | Path, *, overwrite: bool = False) -> Checkpoint:
    """Write the model's checkpoint anew with the weights that changed; every other tensor is copied. names: parameters in memory.

    Raises InputError when a changed weight is stored in few bits, StorageError.
    """
    model = trained.model
    edits = {**_trunk(trained, names), **_experts(trained, names)}
    return edit_checkpoint(model.checkpoint, out, Edits(replace=edits), overwrite=overwrite)


def changed_names(trained: Pretrained) -> set[str]:
    """Names of the parameters that are trained, as they are called when nothing is parametrised."""
    found = {name for name, p in trained.module.named_parameters() if p.requires_grad}
    return {re.sub(r"\.parametrizations\.(\w+)\..*", r".\1", name) for name in found}


def check_stored(checkpoint: Checkpoint, layout: Layout, experts: bool) -> None:
    """Raises InputError when experts are to change and lie in few bits."""
    kinds = {part.dtype for part in layout.parts(ExpertKey(0, 0))}
    if experts and not kinds <= set(FLOATS):
        raise InputError(
            f"the experts are stored as {', '.join(sorted(kinds))}, which training would undo",
            expected="experts as F32, F16 or BF16",
            fix="train first and encode after, or train routers and norms only",
        )


def _trunk(trained: Pretrained, names: set[str]) -> dict[str, Made]:
    model = trained.model
    rename, found = renamer(trained.module), {}
    parameters = dict(trained.module.named_parameters(remove_duplicate=False))
    for name in model.layout.trunk:
        if (key := rename(name)) not in names:
            continue
        ref = model.checkpoint.tensors[name]
        if ref.dtype not in FLOATS:
            raise InputError(f"{name} is stored as {ref.dtype}, which training would undo", expected="F32, F16 or BF16")
        found[name] = Made(ref.dtype, ref.shape, lambda key=key, ref=ref: stored(_numpy(parameters[key]), ref.dtype))
    return found


def _experts(trained: Pretrained, names: set[str]) -> dict[str, Made]:
    """Per-expert tensors, or those that hold a whole layer's experts."""
    model, made = trained.model, {}
    by_place = {(ref.file, ref.offset): name for name, ref in model.checkpoint.tensors.items()}
    inside = {id(p): name for name, p in trained.module.named_parameters()}
    for seam in seams(trained.module, model.layout):
        if not any(inside[id(p)] in names for p in seam.experts.parameters(recurse=False)):
            continue
        facts, experts = seam.facts, Stacked(seam)
        first = model.layout.parts(ExpertKey(facts.ordinal, 0))
        check_stored(model.checkpoint, model.layout, True)
        for at, part in enumerate(first):
            ref = model.checkpoint.tensors[by_place[part.file, part.offset]]
            if ref.shape != part.shape:

                def whole(at: int = at, experts: Stacked = experts, layer: int = facts.ordinal) -> np.ndarray:
                    rows = (model.layout.parts(ExpertKey(layer, e))[at] for e in range(experts.num))
                    return np.stack([_part(experts, e, row) for e, row in enumerate(rows)])

                made[ref.name] = Made(part.dtype, ref.shape, whole)
                continue
            for e in range(facts.num_experts):
                one = model.layout.parts(ExpertKey(facts.ordinal, e))[at]
                name = by_place[one.file, one.offset]
                made[name] = Made(one.dtype, one.shape, lambda e=e, one=one, experts=experts: _part(experts, e, one))
    return made


def _part(experts: Stacked, e: int, part: Part) -> np.ndarray:
    weights = experts.weights(e)
    names = ExpertWeights.__slots__
    return to_part(ExpertWeights(**{n: _numpy(a) if (a := getattr(weights, n)) is not None else None for n in names}), part)  # type: ignore[arg-type]


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy()
