"""A trace: which experts a run chose, token by token and layer by layer. One safetensors file, memory-mapped when read.

Layers with fewer slots than the widest are padded with -1. Shapes: L MoE layers, T tokens, K slots of the widest layer, E experts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moestro.core.errors import StorageError, TraceError

FORMAT = 1
_DTYPES = {"I16": np.int16, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}
_FIELDS = {
    "tokens_T": "I32",
    "sequences_T": "I32",
    "positions_T": "I32",
    "steps_T": "I32",
    "prefill_T": "U8",
    "experts_LTK": "I16",
}
_OPTIONAL = {"weights_LTK": "F16", "logits_LTE": "F16", "ahead_LTK": "I16"}
_SMALL = 128  # layers of this many experts or fewer have their ids written in one byte


class Step(NamedTuple):
    """One forward pass: its number, whether it was prefill, and the rows of the trace it covers."""

    step: int
    prefill: bool
    rows: slice


@dataclass(frozen=True, slots=True)
class Trace:
    """What was routed where.

    tokens_T, sequences_T, positions_T: int32. steps_T: int32, the forward pass each token belonged to, non-decreasing.
    prefill_T: uint8, 1 in prefill. experts_LTK: int16 or int8, -1 in empty slots. weights_LTK: float16, or None when not kept.
    logits_LTE: float16 or None. ahead_LTK: int16 or None; ahead_LTK[l] is what layer l's input predicts for layer l + 1.
    num_experts: E of each layer. model: fingerprint of the model. info: whatever the maker wants to say.
    """

    tokens_T: np.ndarray
    sequences_T: np.ndarray
    positions_T: np.ndarray
    steps_T: np.ndarray
    prefill_T: np.ndarray
    experts_LTK: np.ndarray
    weights_LTK: np.ndarray | None
    num_experts: tuple[int, ...]
    model: str
    logits_LTE: np.ndarray | None = None
    ahead_LTK: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        return int(self.experts_LTK.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.experts_LTK.shape[1])

    def counts(self) -> np.ndarray:
        """counts_LE: how often each expert was chosen."""
        out = np.zeros((self.layers, max(self.num_experts)), np.int64)
        for layer in range(self.layers):
            ids = np.asarray(self.experts_LTK[layer]).reshape(-1)
            found = np.bincount(ids[ids >= 0], minlength=out.shape[1])
            out[layer] = found
        return out

    def transitions(self, layer: int) -> np.ndarray:
        """counts_EE: pairs (expert at `layer`, expert at the next layer) of the same token; all slot pairs are counted."""
        out = np.zeros((self.num_experts[layer], self.num_experts[layer + 1]), np.int64)
        first, second = np.asarray(self.experts_LTK[layer]), np.asarray(self.experts_LTK[layer + 1])
        for i in range(first.shape[1]):
            for j in range(second.shape[1]):
                both = (first[:, i] >= 0) & (second[:, j] >= 0)
                np.add.at(out, (first[both, i], second[both, j]), 1)
        return out

    def cuts(self) -> np.ndarray:
        """int64: the first row of each forward pass, and the number of tokens last."""
        inner = np.flatnonzero(np.diff(self.steps_T)) + 1
        return np.concatenate([[0] if self.tokens else [], inner, [self.tokens]]).astype(np.int64)

    def steps(self) -> Iterator[Step]:
        """The forward passes in order."""
        for start, stop in itertools.pairwise(self.cuts().tolist()):
            yield Step(int(self.steps_T[start]), bool(self.prefill_T[start]), slice(start, stop))

    def save(self, path: str | Path) -> None:
        """Write to `path` through a temporary name. Raises StorageError when the target cannot be written."""
        path = Path(path).absolute()
        arrays = {name: np.ascontiguousarray(getattr(self, name), _DTYPES[dtype]) for name, dtype in _FIELDS.items()}
        if max(self.num_experts, default=0) <= _SMALL:
            arrays["experts_LTK"] = arrays["experts_LTK"].astype(np.int8)
        for name, dtype in _OPTIONAL.items():
            if (value := getattr(self, name)) is not None:
                arrays[name] = np.ascontiguousarray(value, _DTYPES[dtype])
        said = {"format": FORMAT, "model": self.model, "num_experts": list(self.num_experts), "info": self.info}
        header: dict[str, Any] = {"__metadata__": {"moestro_trace": json.dumps(said)}}
        offset = 0
        for name, array in arrays.items():
            header[name] = {
                "dtype": _NAMES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        temporary = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as out:
                out.write(len(raw).to_bytes(8, "little") + raw)
                for array in arrays.values():
                    out.write(array.data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"cannot write the trace {path}: {error}", fix="choose another --output") from error

    @classmethod
    def open(cls, path: str | Path) -> Trace:
        """Map a trace file: the chosen experts are checked once, nothing else is read until it is used. Raises TraceError."""
        path = Path(path)
        try:
            size = path.stat().st_size
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if not 2 <= length <= min(size - 8, 100_000_000):
                    raise ValueError("its header length cannot be right")
                header = json.loads(f.read(length))
            said = json.loads(header.pop("__metadata__")["moestro_trace"])
            if said["format"] != FORMAT:
                raise ValueError(f"it has format {said['format']}, this version reads {FORMAT}")
            arrays: dict[str, np.ndarray] = {}
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
                if stop - start != dtype.itemsize * int(np.prod(shape)) or 8 + length + stop > size:
                    raise ValueError(f"{name} is cut short: the file has {size} bytes, {8 + length + stop} are needed")
                if stop == start:
                    arrays[name] = np.zeros(shape, dtype)
                else:
                    arrays[name] = np.memmap(path, dtype, "r", offset=8 + length + start, shape=shape)
            missing = set(_FIELDS) - set(arrays)
            if missing:
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
            tokens = arrays["tokens_T"].shape[0]
            for name, array in arrays.items():
                if array.shape[1 if "_L" in name else 0] != tokens:
                    raise ValueError(f"{name} has another number of tokens than tokens_T")
            num_experts = tuple(int(e) for e in said["num_experts"])
            if len(num_experts) != arrays["experts_LTK"].shape[0]:
                raise ValueError("its header and its arrays disagree on the number of layers")
            for layer, (ids_TK, count) in enumerate(zip(arrays["experts_LTK"], num_experts, strict=True)):
                if ids_TK.size and not -1 <= ids_TK.min() <= ids_TK.max() < count:
                    raise ValueError(f"layer {layer} of {count} experts has an expert {ids_TK.max()} or {ids_TK.min()}")
            return cls(**{"weights_LTK": None, **arrays}, num_experts=num_experts, model=said["model"], info=said["info"])
        except FileNotFoundError as error:
            raise TraceError(f"there is no trace at {path}", fix="record one with `moestro run ... --trace FILE`") from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise TraceError(
                f"{path} is not a readable trace: {error}",
                expected="a file written by `moestro run --trace`",
                fix="record it again",
            ) from error

    def check_model(self, fingerprint: str) -> None:
        """Raises TraceError when the trace was made with another model."""
        if self.model != fingerprint:
            raise TraceError(
                f"the trace was recorded on the model {self.model[:12]}, this is {fingerprint[:12]}",
                fix="record a trace of this model with `moestro run ... --trace FILE`",
            )
