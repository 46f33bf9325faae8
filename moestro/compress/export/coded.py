"""The result of a plan as a coded checkpoint: every encoded matrix in the tiles that the kernels run, one expert after another.

What the kernels take in one call is coded together or not at all: the experts of a layer, and the trunk's matrices but embedding and
head. Expert tensors are written one by one, however the original keeps them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from moestro.compress.bits import expert_bytes
from moestro.compress.encoding import MATRICES
from moestro.compress.executor import Job, stored
from moestro.compress.slots import build
from moestro.compress.trunk import trunk_matrices
from moestro.core.errors import CheckpointError, PlanError
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.method import card_of, load
from moestro.core.plans.compression import STORED, LayerChange, Slot
from moestro.kernels import native
from moestro.kernels.packed import Packed
from moestro.kernels.reader import READERS
from moestro.models.checkpoint import NUMPY, check_finite
from moestro.models.codecs.coded import bytes_of, codec_of, coded_bytes, describe
from moestro.models.codecs.encode import check_fit, parse_codec
from moestro.models.experts import check_weights, stored_weights
from moestro.models.writer import CheckpointWriter

BIASES = {"gate": "gate_F", "up": "up_F", "down": "down_D"}
_SMALLEST_SHARD = 4 << 20
_EXPERTS = re.compile(r"(?:(?<=\.)|^)(?:experts\.|input_linear\.|output_linear\.).*")


T = TypeVar("T")
R = TypeVar("R")


def side_by_side(fn: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """fn of each item, in order; some more at once than there are cores, each on one thread of the linear algebra. While one is taken away and
    written, the next are on their way."""
    from threadpoolctl import threadpool_limits

    workers, under_way = native.cores() + READERS, deque()  # some read while the others compute
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        for item in items:
            under_way.append(pool.submit(fn, item))
            if len(under_way) > workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class CodedJob(Job):
    """Writes tiles where the plan's last encoding has a codec."""

    def configured(self, config: dict[str, Any]) -> dict[str, Any]:
        """config.json with the place of every tile. Raises PlanError, and InputError for codecs that do not fit the shapes."""
        coded = self.still_coded()
        for change in self.plan.layers:
            codecs = [self._codec(slot.encodings) for slot in change.slots]
            if len({codec == STORED for codec in codecs}) > 1:
                raise PlanError(
                    f"some experts of layer {change.ordinal} have a codec and others have none",
                    expected="all of them or none: the kernels take a layer's experts in one call",
                )
            for number, row in enumerate(change.routed):
                if (codec := codecs[row.slot]) != STORED:
                    names = self.names(change.ordinal, number)
                    coded |= {names[role]: (codec, shape) for role, shape in self._shapes(change.ordinal).items()}
        for name, numbers in self.plan.tensors.items():
            if (codec := self._codec(numbers)) != STORED:
                rows, cols = self.checkpoint.ref(name).shape
                coded[name] = codec, (rows, cols)
        for name, (codec, shape) in coded.items():
            check_fit(parse_codec(codec), shape[1], f"{name} has rows")
        self._together({name for name in coded if name in self.plan.tensors})
        used = dict.fromkeys((e.method.removeprefix("compress."), e.codec) for e in self.plan.encodings if e.codec != STORED)
        changes = list(config["quantization_config"].get("changes", ())) if self.still_coded() else []
        changes += [f"weights are kept as {codec} ({method})" for method, codec in used]
        if routers := {e.method for e in self.plan.encodings if card_of(load(e.method)).kind == "encode_router"}:
            changes.append(f"routers are rounded ({', '.join(sorted(routers))})")
        return {k: v for k, v in config.items() if k != "quantization_config"} | {"quantization_config": describe(coded, changes)}

    def names(self, ordinal: int, expert: int) -> dict[str, str]:
        """The tensors of one expert, by role: as the original calls them, or what it would call them one by one."""
        parts = self.layout.parts(ExpertKey(ordinal, 0))
        given = {part.role: self._names[part.file, part.offset] for part in parts}
        if "gate_up" not in given and all(".0." in name for name in given.values()):
            return {r: re.sub(r"(experts\.)0\.", rf"\g<1>{expert}.", name) for r, name in given.items() if r in MATRICES}
        base = _EXPERTS.sub("experts.", next(iter(given.values())))
        roles = MATRICES if self.layout.facts.layers[ordinal].spec.gated else ("up", "down")
        return {role: f"{base}{expert}.{role}_proj.weight" for role in roles}

    def write_layer(self, change: LayerChange, writer: CheckpointWriter) -> None:
        if self._codec(change.slots[0].encodings) == STORED:
            super().write_layer(change, writer)
            return
        dtype = next((p.dtype for p in self.layout.parts(ExpertKey(change.ordinal, 0)) if p.role.endswith("_bias")), "F32")
        waiting = []
        for number, slot in enumerate(change.slots):
            targets = [self.names(change.ordinal, i) for i, row in enumerate(change.routed) if row.slot == number]
            if not all(name in writer for names in targets for name in names.values()):
                waiting.append((slot, targets))
        if not waiting:
            return
        self.prepare(change)

        def encode(slot: Slot) -> tuple[ExpertWeights, dict[str, np.ndarray | Packed]]:
            if not (slot.copied and self.encoder.takes_stored(slot.encodings)):
                weights = build(slot, self.reader(change.ordinal), self._width)
                return weights, self.encoder.tiles(change.ordinal, slot, weights)
            key = ExpertKey(change.ordinal, slot.sources[0])
            with self.bulk.lend(self.layout.parts(key)) as raws:
                weights = stored_weights(self.layout.parts(key), raws)
                try:
                    made = self.encoder.tiles(change.ordinal, slot, weights)
                except CheckpointError:
                    check_weights(weights, key)  # says which, where that is the cause
                    raise
            return replace(weights, gate_FD=None, up_FD=None, down_DF=None), made  # they lie in a buffer that is used again

        for (slot, targets), (weights, made) in zip(waiting, side_by_side(encode, [slot for slot, _ in waiting]), strict=True):
            for names in targets:
                for role, name in names.items():
                    self._put(writer, name, made[role], self._codec(slot.encodings))
                for role, field in BIASES.items():
                    if (bias := getattr(weights, field)) is not None:
                        writer.add(names[role].removesuffix("weight") + "bias", stored(bias, dtype), dtype)

    @property
    def layer_bytes(self) -> int:
        return expert_bytes(self.plan, self.layout) // len(self.plan.layers)

    @property
    def shard_bytes(self) -> int:
        return max(self.layer_bytes, _SMALLEST_SHARD)

    def write_tensor(self, name: str, numbers: tuple[int, ...], writer: CheckpointWriter) -> None:
        codec = self._codec(numbers)
        if codec == STORED:
            super().write_tensor(name, numbers, writer)
        else:
            self._put(writer, name, self._encoded(name, numbers), codec)

    def _encoded(self, name: str, numbers: tuple[int, ...]) -> np.ndarray | Packed:
        ref = self.checkpoint.tensors[name]
        if name in self.touched or not self.encoder.takes_stored(numbers):
            return self.encoder.matrix(name, numbers, self.rescaled(name))
        with self.bulk.lend([ref]) as (raw,):
            w_RC = raw.view(NUMPY[ref.dtype]).reshape(ref.shape)
            try:
                return self.encoder.matrix(name, numbers, w_RC)
            except CheckpointError:
                check_finite(w_RC, name)
                raise

    def _put(self, writer: CheckpointWriter, name: str, matrix: np.ndarray | Packed, codec: str) -> None:
        if not isinstance(matrix, Packed) or codec_of(matrix).name != codec:
            kind = codec_of(matrix).name if isinstance(matrix, Packed) else "plain numbers"
            raise PlanError(f"{name} came out as {kind}", expected=codec, fix="let the plan name the codec that its method makes")
        writer.stream(name, "U8", (coded_bytes(codec, matrix.shape),), bytes_of(matrix))

    def _codec(self, numbers: tuple[int, ...]) -> str:
        """Of the last encoding."""
        return parse_codec(self.plan.encodings[numbers[-1]].codec).name if numbers else STORED

    def _shapes(self, ordinal: int) -> dict[str, tuple[int, int]]:
        spec = self.layout.facts.layers[ordinal].spec
        inner = dict.fromkeys(("gate", "up") if spec.gated else ("up",), (self._width, spec.d_model))
        return inner | {"down": (spec.d_model, self._width)}

    def _together(self, coded: set[str]) -> None:
        found = trunk_matrices(self.checkpoint, self.layout)
        inner = found.inner
        if (some := coded & set(inner)) and (others := [n for n in inner if n not in coded]):
            raise PlanError(
                f"{sorted(some)[0]} has a codec and {others[0]} has none",
                expected="all of the trunk's matrices but embedding and head, or none",
            )
