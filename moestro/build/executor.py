"""Carries out a ConstructionPlan: reads the dense checkpoints tensor by tensor and writes the new one. Holds one layer's feed-forward at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moestro.build import mixtral
from moestro.core.errors import PlanError
from moestro.core.plans.construction import ConstructionPlan, NewLayer
from moestro.kernels.convert import to_bf16
from moestro.models.checkpoint import Checkpoint
from moestro.models.writer import CheckpointWriter

Progress = Callable[[str, float], None]  # (what is being done, fraction from 0 to 1)


@dataclass(frozen=True, slots=True)
class Built:
    """What was written: tensors, bytes read and written, and the tensors of the source that were left out on purpose."""

    path: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    dropped: tuple[str, ...]


def build(plan: ConstructionPlan, subjects: Sequence[Checkpoint], out: str | Path, *, progress: Progress | None = None) -> Built:
    """Write the checkpoint `plan` describes into the folder `out`; every source tensor is read once.

    Raises PlanError when the subjects are not the plan's or it names something they lack, CheckpointError, StorageError.
    """
    _check(plan, subjects)
    first, out = subjects[0], Path(out)
    layers = {layer.index: layer for layer in plan.layers}
    replaced = {mixtral.dense_name(i, m) for i in layers for m in mixtral.MATRICES}
    trunk = [name for name in first.tensors if name not in replaced and name not in plan.dropped]
    total = sum(first.tensors[name].nbytes for name in trunk) + sum(
        subjects[e.subject].tensors[mixtral.dense_name(e.layer, m)].nbytes
        for layer in plan.layers for e in layer.experts for m in mixtral.MATRICES
    )  # fmt: skip
    read = written = tensors = 0

    def count(nbytes: int) -> None:
        nonlocal written, tensors
        written, tensors = written + nbytes, tensors + 1
        if progress:
            progress("writing experts", min(1.0, written / total))

    with CheckpointWriter(out, plan.config) as writer:
        # Layer by layer, an expert's matrices side by side: whoever streams experts then reads one contiguous range.
        for name in sorted(trunk, key=lambda name: _place(name, max(layers, default=0))):
            if (index := _layer(name)) in layers:
                read += _write_layer(layers.pop(index), subjects, writer, count)
            writer.copy(name, first)
            read += first.tensors[name].nbytes
            count(first.tensors[name].nbytes)
        assert not layers, "every decoder layer has norms"
        for subject in subjects:
            subject.unchanged()
        writer.finish(copy_files_from=first)
    return Built(out, tensors, read, written, plan.dropped)


def _write_layer(layer: NewLayer, subjects: Sequence[Checkpoint], writer: CheckpointWriter, count: Callable[[int], None]) -> int:
    """Router and experts of one layer; returns the bytes read."""

    def put(name: str, array: np.ndarray, dtype: str) -> None:
        writer.add(name, array, dtype)
        count(array.nbytes)

    held: dict[tuple[int, int, str], tuple[np.ndarray, str]] = {}
    for source in layer.experts:
        for matrix in mixtral.MATRICES:
            if (source.subject, source.layer, matrix) not in held:
                name, checkpoint = mixtral.dense_name(source.layer, matrix), subjects[source.subject]
                held[source.subject, source.layer, matrix] = checkpoint.read(name), checkpoint.tensors[name].dtype
    (gate, dtype), start = held[layer.experts[0].subject, layer.experts[0].layer, "w1"], layer.router
    drawn = np.random.default_rng([start.seed, layer.index]).standard_normal((len(layer.experts), gate.shape[1]), np.float32)
    put(mixtral.router_name(layer.index), _stored(drawn * np.float32(start.std), dtype), dtype)
    for e, source in enumerate(layer.experts):
        for matrix in mixtral.MATRICES:
            put(mixtral.expert_name(layer.index, e, matrix), *held[source.subject, source.layer, matrix])
    return sum(array.nbytes for array, _ in held.values())


def _check(plan: ConstructionPlan, subjects: Sequence[Checkpoint]) -> None:
    if (plan.source_format, plan.format) != (mixtral.DENSE, mixtral.FORMAT):
        raise PlanError(f"the plan makes {plan.format} of {plan.source_format}", expected=f"{mixtral.FORMAT} of {mixtral.DENSE}")
    plan.check_subjects([s.fingerprint for s in subjects])
    for layer in plan.layers:
        if len(layer.experts) != plan.config.get("num_local_experts"):
            raise PlanError(
                f"layer {layer.index} of the plan has {len(layer.experts)} experts",
                expected=f"the {plan.config.get('num_local_experts')} of its config",
            )
        for source in layer.experts:
            known = 0 <= source.subject < len(subjects)
            if not known or mixtral.dense_name(source.layer, "w1") not in subjects[source.subject].tensors:
                raise PlanError(
                    f"the plan takes an expert from layer {source.layer} of model {source.subject}, which does not exist"
                )
    if sorted(layer.index for layer in plan.layers) != list(range(plan.config.get("num_hidden_layers", 0))):
        raise PlanError(
            "the plan does not make every decoder layer once", expected="one MoE layer per decoder layer, as Mixtral has"
        )


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return to_bf16(values)
    return values.astype(np.float16 if dtype == "F16" else np.float32)


def _layer(name: str) -> int:
    """The decoder layer a tensor belongs to, or -1."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def _place(name: str, last: int) -> tuple[int, str]:
    """Order on disk: embeddings, then layer by layer, then the final norm and head."""
    index = _layer(name)
    return (index if index >= 0 or "embed" in name else last + 1, name)
