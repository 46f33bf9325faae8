"""Carries out a CompressionPlan on a live model: the same arithmetic and rounding as the executor's, with no file in between. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from moestro.compress.encoding import Encoder, one_thread, plain
from moestro.compress.executor import router_rows
from moestro.compress.rehearsal import rehearse
from moestro.compress.slots import arrays_of, build, mixed_rows
from moestro.compress.smooth.smoothing import touched
from moestro.core.errors import UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.plans.compression import CompressionPlan, LayerChange
from moestro.models.experts import Stacked
from moestro.models.families.resize import expert_axis, is_router, resized
from moestro.models.layout import Layout
from moestro.models.live import Seam, seams, skeleton
from moestro.models.open import Model

if TYPE_CHECKING:
    import torch


def compress_live(plan: CompressionPlan, model: Model, *, encoder: Encoder | None = None) -> Model:
    """A new live model as `plan` says; `model` stays as it was, and both share what is not changed.

    Raises PlanError when the plan is of another model, UnsupportedModel when the family cannot hold the result.
    """
    facts, checkpoint = model.facts, model.checkpoint
    plan.check(facts)
    encoder = encoder or Encoder(plan, facts)
    rehearse(plan, facts)
    width = plan.width(facts)
    config = resized(checkpoint.config, facts, experts=plan.experts, d_expert=width)
    layers = tuple(replace(la, num_experts=plan.experts, spec=replace(la.spec, d_expert=width)) for la in facts.layers)
    layout = Layout(replace(facts, layers=layers), model.layout.trunk, model.layout.ignored, _no_files)
    dtype = str(next(iter(model.module.parameters())).dtype).removeprefix("torch.")
    module = skeleton(replace(checkpoint, config=config), dtype)
    found = seams(module, layout)
    with one_thread(plan):
        for seam, change in zip(found, plan.layers, strict=True):
            _fill(seam, model, change, encoder, width)
        _share(module, model, plan, encoder)
    made = Model(replace(checkpoint, config=config), layout, module, found)
    made.tap([la.taps for la in plan.layers])
    return made


def _no_files(key: ExpertKey) -> NoReturn:
    raise UnsupportedModel(
        "a model that was compressed in memory has no files", fix="write it with `moestro apply`, and open that"
    )


def _fill(seam: Seam, model: Model, change: LayerChange, encoder: Encoder, width: int) -> None:
    """Give one layer's experts module real parameters: the slots, one for each row of the router."""
    import torch

    module, experts = seam.experts, Stacked(seam)
    for name, made in dict(module.named_parameters(recurse=False)).items():
        module._parameters[name] = torch.nn.Parameter(torch.zeros(made.shape, dtype=made.dtype))
    made_of = {}
    encoder.prepare(
        change, lambda slot: build(slot, lambda e: _plain(model, change.ordinal, e), width), _router(model, change.ordinal)
    )
    for number, slot in enumerate(change.slots):
        made_of[number] = encoder.expert(change.ordinal, slot, build(slot, lambda e: _plain(model, change.ordinal, e), width))
    with torch.no_grad():
        for i, row in enumerate(change.routed):
            into = experts.weights(i)
            for name, array in arrays_of(made_of[row.slot]).items():
                getattr(into, name).copy_(torch.from_numpy(np.ascontiguousarray(array)))


def _plain(model: Model, ordinal: int, expert: int) -> ExpertWeights:
    tensors: dict[str, Any] = arrays_of(model.weights(ExpertKey(ordinal, expert)))
    arrays = {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    return ExpertWeights(**{name: arrays.get(name) for name in ExpertWeights.__slots__})  # type: ignore[arg-type]


def _share(module: Any, model: Model, plan: CompressionPlan, encoder: Encoder) -> None:
    """Everything that is no expert: routers with their new rows, encoded matrices, and the old model's own tensors for the rest."""
    import torch

    old: Any = model.module
    inside = tuple(f"{name}." for name, m in module.named_modules() if name.rpartition(".")[2] == "experts")
    changes = {facts.index: change for facts, change in zip(model.facts.layers, plan.layers, strict=True)}
    experts = {facts.index: facts.num_experts for facts in model.facts.layers}
    numbers = _in_memory(module, plan)
    scaled = _scales(module, model, plan, encoder)
    for name, tensor in [*old.named_parameters(remove_duplicate=False), *old.named_buffers(remove_duplicate=False)]:
        if name.startswith(inside):
            continue
        index = _layer(name)
        value: torch.Tensor = tensor
        factor_D, plain_D = scaled.get(name, (None, None))
        if factor_D is not None:
            value = (tensor.detach().float() * torch.from_numpy(factor_D)).to(tensor.dtype)
        if index in changes and is_router(name):
            axis = expert_axis(tuple(tensor.shape), experts[index], name)
            rows = mixed_rows(np.moveaxis(value.detach().float().numpy(), axis, 0), changes[index].routed)
            if name in numbers:
                rows = encoder.router(changes[index].ordinal, numbers[name], rows, plain_D)
            value = torch.from_numpy(np.ascontiguousarray(np.moveaxis(rows, 0, axis))).to(tensor.dtype)
        elif name in numbers:
            value = torch.from_numpy(plain(encoder.matrix(name, numbers[name], value.detach().float().numpy()))).to(tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if leaf in parent._parameters:
            parent._parameters[leaf] = value if value is tensor else torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            parent._buffers[leaf] = value


def _router(model: Model, ordinal: int) -> Callable[[], np.ndarray]:
    return partial(router_rows, model.checkpoint, model.layout, ordinal)


def _scales(module: Any, model: Model, plan: CompressionPlan, encoder: Encoder) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of the tensors that a smoothing touches, in memory: what they are multiplied with, and what the layer's inputs are divided by."""
    from moestro.models.live import renamer

    if not encoder.smooths:
        return {}
    rename, width, out = renamer(module), plan.width(model.facts), {}
    for name, (ordinal, divided) in touched(model.checkpoint, model.layout).items():
        change = plan.layers[ordinal]
        found = encoder.smoothing(
            change, lambda slot, at=ordinal: build(slot, lambda e: _plain(model, at, e), width), _router(model, ordinal)
        )
        assert found is not None
        out[rename(name)] = (1 / found.scale_D if divided else found.scale_D, found.scale_D)
    return out


def _in_memory(module: Any, plan: CompressionPlan) -> dict[str, tuple[int, ...]]:
    from moestro.models.live import renamer

    rename = renamer(module)
    return {rename(name): numbers for name, numbers in plan.tensors.items()}


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts[:-1] else -1
