"""Carries out a CompressionPlan from checkpoint to checkpoint, layer by layer: what is kept is copied byte by byte, what changes is computed.

Memory: a new layer at most, in the numbers of the file, and one expert in float32. An interrupted run goes on at the layer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moestro.compress.dropping import layer_of, lost_tensors, predicts
from moestro.compress.encoding import Encoder, one_thread, plain
from moestro.compress.record import write_record
from moestro.compress.rehearsal import rehearse
from moestro.compress.slots import build, mixed_rows
from moestro.compress.smooth.smoothing import touched
from moestro.core.errors import InputError, PlanError
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot
from moestro.models.bulk import BulkReader
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import describe, is_coded
from moestro.models.experts import read_expert
from moestro.models.families.resize import expert_axis, resized, router_tensors, without_predictions
from moestro.models.layout import Layout, Part
from moestro.models.parts import FLOATS, floats, stored, to_part
from moestro.models.taps import read_taps
from moestro.models.writer import CheckpointWriter, check_room

Progress = Callable[[int, int], None]  # (layers done, layers)
Coded = dict[str, tuple[str, tuple[int, int]]]  # by name: codec and shape
_EXPERT = re.compile(r"((?:^|\.)experts\.)(\d+)(\.)")
_SMALLEST_SHARD = 64 << 20


@dataclass(frozen=True, slots=True)
class Compressed:
    """What was written. dropped: tensors of the source that are not in the result, each allowed by the plan."""

    checkpoint: Checkpoint
    bytes_before: int
    bytes_after: int
    dropped: tuple[str, ...]


def compress(
    plan: CompressionPlan,
    checkpoint: Checkpoint,
    layout: Layout,
    out: str | Path,
    *,
    encoder: Encoder | None = None,
    form: type[Job] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Compressed:
    """Write the checkpoint that `plan` describes into the folder `out`. encoder: carries out the plan's encodings.

    form: how the result is written; plain numbers in the original's own form by default.

    Raises PlanError when the plan is of another model, CoverageError for tensors that would be lost and are not named,
    UnsupportedModel when the family cannot hold the result, CheckpointError, StorageError; all that can be known before, before.
    """
    out = Path(out)
    if out.resolve() == checkpoint.path.resolve():
        raise InputError(f"{out} is the checkpoint being read", fix="choose another output folder")
    job, config, lost = prepare(plan, checkpoint, layout, encoder=encoder, form=form)
    routers = {name: la for la in plan.layers for name in router_tensors(checkpoint, layout, la.ordinal)}
    by_index = {layout.facts.layers[la.ordinal].index: la for la in plan.layers}
    check_room(out, layout.facts.trunk_bytes + len(plan.layers) * job.layer_bytes)
    key = hashlib.sha256(json.dumps(plan.to_json(), sort_keys=True).encode()).hexdigest()
    resume_key = f"{checkpoint.fingerprint} {key} {type(job).__name__}"
    with (
        one_thread(plan),
        job.bulk,
        CheckpointWriter(out, config, shard_bytes=job.shard_bytes, overwrite=overwrite, resume_key=resume_key) as writer,
    ):
        waiting, done = dict(by_index), 0
        for name in sorted((n for n in checkpoint.tensors if not job.is_expert(n) and n not in lost), key=_place):
            if (index := layer_of(name)) in waiting:
                job.write_layer(waiting.pop(index), writer)
                done += 1
                if progress:
                    progress(done, len(by_index))
            if name in writer:
                continue
            if (change := routers.get(name)) is not None:
                writer.add(name, *job.router(name, change))
            elif name in plan.tensors:
                job.write_tensor(name, plan.tensors[name], writer)
            elif name in job.touched:
                writer.add(name, stored(job.rescaled(name), checkpoint.tensors[name].dtype), checkpoint.tensors[name].dtype)
            else:
                writer.copy(name, checkpoint)
        assert not waiting, "every decoder layer has norms"
        checkpoint.unchanged()
        write_record(plan, checkpoint, layout.facts, writer.partial)
        made = writer.finish(copy_files_from=checkpoint)
    return Compressed(made, checkpoint.nbytes, made.nbytes, tuple(sorted(lost)))


def prepare(
    plan: CompressionPlan,
    checkpoint: Checkpoint,
    layout: Layout,
    *,
    encoder: Encoder | None = None,
    form: type[Job] | None = None,
) -> tuple[Job, dict[str, Any], set[str]]:
    """The work, the new config.json and the tensors that will be left out; all that can be known to be wrong before is found here."""
    facts = layout.facts
    plan.check(facts)
    if unknown := sorted(set(plan.tensors) - set(layout.trunk)):
        raise PlanError(f"the plan encodes {unknown[0]}, which is no trunk tensor of this model", fix="make the plan again")
    if read_taps(checkpoint):
        raise PlanError(
            f"{checkpoint.path} skips experts when it runs, and what is made from it would not",
            expected="a model without taps on its routing",
            fix="plan from the model before it, and skip last: moestro plan METHOD MODEL --after PLAN",
        )
    config = resized(checkpoint.config, facts, experts=plan.experts, d_expert=plan.width(facts))
    for la in plan.layers:
        stored = {part.dtype for part in layout.parts(ExpertKey(la.ordinal, 0))}
        if not stored <= set(FLOATS) and any(not slot.copied or slot.encodings for slot in la.slots):
            raise PlanError(
                f"the experts are stored as {', '.join(sorted(stored))}, in which they can be removed but not changed",
                expected="experts as F32, F16 or BF16",
                fix="use a revision of the model in bfloat16",
            )
    for name in plan.tensors:
        ref = checkpoint.tensors[name]
        if ref.dtype not in FLOATS or len(ref.shape) != 2:
            raise PlanError(
                f"{name} is {ref.dtype} {list(ref.shape)}", expected="a matrix of floats", fix="take it out of the plan"
            )
    rehearse(plan, facts)
    reshaped = plan.experts != facts.layers[0].num_experts or plan.width(facts) != facts.layers[0].spec.d_expert
    lost = lost_tensors(plan.dropped, layout, reshaped=reshaped)
    job = (form or Job)(plan, checkpoint, layout, encoder or Encoder(plan, facts))
    config = job.configured(without_predictions(config) if any(predicts(name, facts) for name in lost) else config)
    return job, config, lost


class Job:
    """One checkpoint's layers, as they are asked for."""

    def __init__(self, plan: CompressionPlan, checkpoint: Checkpoint, layout: Layout, encoder: Encoder) -> None:
        self.plan, self.checkpoint, self.layout, self.encoder = plan, checkpoint, layout, encoder
        self._names = {(ref.file, ref.offset): name for name, ref in checkpoint.tensors.items()}
        self._experts = set(checkpoint.tensors) - set(layout.trunk) - set(layout.ignored)
        self._width = plan.width(layout.facts)
        self.touched = touched(checkpoint, layout) if encoder.smooths else {}
        self.bulk = BulkReader(checkpoint)

    def configured(self, config: dict[str, Any]) -> dict[str, Any]:
        """The new config.json with what the form adds to it; everything that can be wrong with the form is found here."""
        coded = self.still_coded()
        return (
            config | {"quantization_config": describe(coded, config["quantization_config"].get("changes", ()))}
            if coded
            else config
        )

    def still_coded(self) -> Coded:
        """The tensors of the result that are copied in tiles: codec and shape of each, by its new name."""
        there = {
            name: (ref.dtype, (ref.shape[0], ref.shape[1]))
            for name, ref in self.checkpoint.tensors.items()
            if is_coded(ref.dtype)
        }
        coded = {name: found for name, found in there.items() if name in self.layout.trunk and name not in self.plan.tensors}
        for change in self.plan.layers if there else ():
            for i, row in enumerate(change.routed):
                names = self._stored_names(change.ordinal, change.slots[row.slot])
                coded |= {_renamed(name, i): there[name] for name in names if name in there}
        return coded

    def _stored_names(self, ordinal: int, slot: Slot) -> list[str]:
        """Of the slot's first source, part by part."""
        return [self._names[part.file, part.offset] for part in self.layout.parts(ExpertKey(ordinal, slot.sources[0]))]

    def is_expert(self, name: str) -> bool:
        return name in self._experts

    @property
    def layer_bytes(self) -> int:
        """Of the experts of one new layer, about."""
        la = self.layout.facts.layers[0]
        return self.plan.experts * la.expert_bytes * self._width // la.spec.d_expert

    @property
    def shard_bytes(self) -> int:
        """What is written before a run that is interrupted later keeps it: about a layer."""
        return max(*(la.num_experts * la.expert_bytes for la in self.layout.facts.layers), _SMALLEST_SHARD)

    def write_layer(self, change: LayerChange, writer: CheckpointWriter) -> None:
        """All experts of one layer, one after another, or tensor by tensor where a tensor holds them all."""
        parts = self.layout.parts(ExpertKey(change.ordinal, 0))
        self.prepare(change)
        if any(self.checkpoint.tensors[self._names[part.file, part.offset]].shape != part.shape for part in parts):
            self._write_fused(change, writer, parts)
            return
        for number, slot in enumerate(change.slots):
            rows = [i for i, row in enumerate(change.routed) if row.slot == number]
            source = self.layout.parts(ExpertKey(change.ordinal, slot.sources[0]))
            names = self._stored_names(change.ordinal, slot)
            made: list[np.ndarray] | None = None
            for row in rows:
                targets = [_renamed(name, row) for name in names]
                if all(name in writer for name in targets):
                    continue
                if slot.copied and not slot.encodings:
                    for name, target in zip(names, targets, strict=True):
                        writer.copy(target, self.checkpoint, name)
                else:
                    made = made or self.make(change.ordinal, slot, source)
                    for target, part, array in zip(targets, source, made, strict=True):
                        writer.add(target, array, part.dtype)

    def _write_fused(self, change: LayerChange, writer: CheckpointWriter, parts: tuple[Part, ...]) -> None:
        names = [self._names[part.file, part.offset] for part in parts]
        if all(name in writer for name in names):
            return
        made = {
            i: self.make(change.ordinal, slot, parts)
            for i, slot in enumerate(change.slots)
            if not slot.copied or slot.encodings
        }  # fmt: skip
        for at, (name, part) in enumerate(zip(names, parts, strict=True)):
            shape = made[min(made)][at].shape if made else part.shape

            def pieces(at: int = at) -> Iterator[np.ndarray]:
                for row in change.routed:
                    if row.slot in made:
                        yield made[row.slot][at]
                    else:
                        one = self.layout.parts(ExpertKey(change.ordinal, change.slots[row.slot].sources[0]))[at]
                        raw = np.empty(one.nbytes, np.uint8)
                        self.checkpoint.read_range(one.file, one.offset, raw)
                        yield raw

            writer.stream(name, part.dtype, (len(change.routed), *shape), pieces())

    def reader(self, ordinal: int) -> Callable[[int], ExpertWeights]:
        """Gives the old experts of a layer."""
        return partial(_read, self.checkpoint, self.layout, ordinal)

    def make(self, ordinal: int, slot: Slot, parts: tuple[Part, ...]) -> list[np.ndarray]:
        """A slot's arrays, one for each part, as the file stores them."""
        weights = self.encoder.expert(ordinal, slot, self._built(ordinal)(slot))
        return [to_part(weights, part) for part in parts]

    def prepare(self, change: LayerChange) -> None:
        """Let the encoder find what the layer's slots share."""
        self.encoder.prepare(
            change, self._built(change.ordinal), partial(router_rows, self.checkpoint, self.layout, change.ordinal)
        )

    def _built(self, ordinal: int) -> Callable[[Slot], ExpertWeights]:
        return lambda slot: build(slot, self.reader(ordinal), self._width)

    def router(self, name: str, change: LayerChange) -> tuple[np.ndarray, str]:
        """A router's tensor with its new rows, and its dtype."""
        ref = self.checkpoint.tensors[name]
        axis = expert_axis(ref.shape, self.layout.facts.layers[change.ordinal].num_experts, name)
        new = mixed_rows(np.moveaxis(self.rescaled(name), axis, 0), change.routed)
        if name in self.plan.tensors:
            new = self.encoder.router(change.ordinal, self.plan.tensors[name], new, self._scale(change.ordinal))
        return stored(np.ascontiguousarray(np.moveaxis(new, 0, axis)), ref.dtype), ref.dtype

    def rescaled(self, name: str) -> np.ndarray:
        """A trunk tensor in float32, in the scale that the plan's smoothing gives the layer's inputs."""
        values = floats(self.checkpoint.read(name), self.checkpoint.tensors[name].dtype)
        if name not in self.touched:
            return values
        ordinal, divided = self.touched[name]
        scale_D = self._scale(ordinal)
        assert scale_D is not None, "only a smoothing touches tensors"
        return values / scale_D if divided else values * scale_D

    def _scale(self, ordinal: int) -> np.ndarray | None:
        found = self.encoder.smoothing(
            self.plan.layers[ordinal], self._built(ordinal), partial(router_rows, self.checkpoint, self.layout, ordinal)
        )
        return None if found is None else found.scale_D

    def write_tensor(self, name: str, numbers: tuple[int, ...], writer: CheckpointWriter) -> None:
        """A trunk tensor after its encodings."""
        made, dtype = self.encoder.matrix(name, numbers, self.rescaled(name)), self.checkpoint.tensors[name].dtype
        writer.add(name, stored(plain(made), dtype), dtype)


def _renamed(name: str, expert: int) -> str:
    """An expert's tensor under another number."""
    return _EXPERT.sub(lambda m: f"{m[1]}{expert}{m[3]}", name)


def router_rows(checkpoint: Checkpoint, layout: Layout, ordinal: int) -> np.ndarray:
    """The weights that give a layer's router logits, float32 [E, D]."""
    for name in router_tensors(checkpoint, layout, ordinal):
        ref = checkpoint.tensors[name]
        if len(ref.shape) == 2 and ref.shape[1] == layout.facts.d_model:
            return floats(checkpoint.read(name), ref.dtype)
    raise PlanError(
        f"the router of MoE layer {ordinal} is no matrix of [experts, {layout.facts.d_model}]", fix="plan without --smooth"
    )


def _read(checkpoint: Checkpoint, layout: Layout, ordinal: int, expert: int) -> ExpertWeights:
    return read_expert(checkpoint, layout, ExpertKey(ordinal, expert))


def _place(name: str) -> tuple[int, int, str]:
    """Order in the file: embeddings, then layer by layer, then what follows them."""
    index = layer_of(name)
    return (1, index, name) if index >= 0 else (0 if "embed" in name else 2, 0, name)
