"""Experts as checkpoints store them: F32, F16, BF16 and MXFP4; apart or fused, transposed, interleaved, with biases.

Source: `transformers` 5 `integrations/mxfp4.py` and `modeling_gpt_oss.py` for MXFP4's and GPT-OSS's order of values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.core.experts import ExpertWeights
from moestro.kernels.convert import split_gate_up, to_f32, transpose
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.packed import Packed
from moestro.models.checkpoint import NUMPY, Checkpoint
from moestro.models.codecs.coded import is_coded, packed_in
from moestro.models.codecs.encode import TILED_MXFP4
from moestro.models.layout import Part

FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def load(checkpoint: Checkpoint, parts: Sequence[Part]) -> list[np.ndarray]:
    """Read one expert's parts: a uint8 array for each. Raises CheckpointError."""
    raws = []
    for part in parts:
        raw = np.empty(part.nbytes, np.uint8)
        checkpoint.read_range(part.file, part.offset, raw)
        raws.append(raw)
    return raws


def decode(parts: Sequence[Part], raws: Sequence[np.ndarray]) -> ExpertWeights:
    """One expert's weights in float32. parts, raws: as for `view`. Raises CheckpointError."""
    return weights_of(view(parts, raws))


def weights_of(expert: ExpertView) -> ExpertWeights:
    """An expert in any number format as float32 weights."""
    gate = None if expert.gate is None else expert.gate.dequantise()
    biases = expert.gate_bias, expert.up_bias, expert.down_bias
    return ExpertWeights(gate, expert.up.dequantise(), expert.down.dequantise(), *biases)


def view(parts: Sequence[Part], raws: Sequence[np.ndarray]) -> ExpertView:
    """One expert in its stored number format, ready to run. raws: the parts' bytes, uint8 and contiguous, at any alignment.

    The matrices are views of `raws`, except those stored transposed, which are copied. Raises CheckpointError.
    """
    stored = {part.role: (part, raw) for part, raw in zip(parts, raws, strict=True)}
    assert len(stored) == len(parts), "a role appears twice"
    matrices: dict[str, Matrix | Packed] = {}
    biases: dict[str, np.ndarray] = {}
    try:
        for role in ("gate", "up", "down"):
            if role in stored:
                part, raw = stored[role]
                matrices[role] = _one(part, raw, _scales(stored, role))
            if (bias := stored.get(role + "_bias")) is not None:
                biases[role] = to_f32(_array(*bias)).reshape(-1)
        if "gate_up" in stored:
            part, raw = stored["gate_up"]
            how = {"transposed": part.transposed, "interleaved": part.interleaved}
            both = split_gate_up(_values(part, raw), **how)
            scales = _scales(stored, "gate_up")
            split = (None, None) if scales is None else split_gate_up(scales, transposed=False, interleaved=part.interleaved)
            matrices["gate"], matrices["up"] = (_matrix(part, both[i], split[i]) for i in range(2))
            if (bias := stored.get("gate_up_bias")) is not None:
                row = to_f32(_array(*bias)).reshape(-1, 1)  # split like a matrix of one column
                halves = split_gate_up(row, transposed=False, interleaved=part.interleaved)
                biases["gate"], biases["up"] = (np.ascontiguousarray(half[:, 0]) for half in halves)
        return ExpertView(
            matrices.get("gate"), matrices["up"], matrices["down"], biases.get("gate"), biases.get("up"), biases.get("down")
        )
    except ValueError as error:
        raise CheckpointError(
            f"an expert in {parts[0].file} cannot be right: {error}", fix="check that the configuration belongs to these files"
        ) from error


def stored_format(parts: Sequence[Part]) -> str:
    """The number format that holds these parts exactly: 'f32', 'f16', 'bf16', 'mxfp4' or a codec; 'f32' when they differ. Raises CheckpointError."""
    roles = {part.role for part in parts}
    kinds = {_format(part, part.role + "_scales" in roles) for part in parts if part.role in ("gate", "up", "gate_up", "down")}
    return kinds.pop() if len(kinds) == 1 else "f32"


def _format(part: Part, scaled: bool) -> str:
    if is_coded(part.dtype):
        return TILED_MXFP4 if part.dtype == "mxfp4" else part.dtype
    if part.dtype == "U8" and scaled:
        return "mxfp4"
    if part.dtype not in FORMATS:
        raise CheckpointError(
            f"experts in {part.file} are stored as {part.dtype}" + ("" if part.dtype != "U8" else " without scales"),
            expected="F32, F16, BF16, or MXFP4 blocks with their scales",
            fix="use a revision of the model in one of these, such as its BF16 weights",
        )
    return FORMATS[part.dtype]


def _array(part: Part, raw: np.ndarray) -> np.ndarray:
    assert raw.dtype == np.uint8 and raw.nbytes == part.nbytes, f"{part.role} needs {part.nbytes} bytes, not {raw.nbytes}"
    if part.dtype not in (*FORMATS, "U8"):
        _format(part, False)
    return raw.reshape(-1).view(NUMPY[part.dtype]).reshape(part.shape)


def _values(part: Part, raw: np.ndarray) -> np.ndarray:
    """2-D, as stored; MXFP4 blocks [rows, blocks, 16] become [rows, cols / 2]."""
    array = _array(part, raw)
    assert part.dtype != "U8" or not part.transposed, "MXFP4 blocks lie along the inputs"
    return array.reshape(array.shape[0], -1)


def _scales(stored: dict[str, tuple[Part, np.ndarray]], role: str) -> np.ndarray | None:
    found = stored.get(role + "_scales")
    return None if found is None else _array(*found)


def _one(part: Part, raw: np.ndarray, scales: np.ndarray | None) -> Matrix | Packed:
    if is_coded(part.dtype):
        return packed_in(raw, part.dtype, part.shape)
    data = _values(part, raw)
    return _matrix(part, transpose(data) if part.transposed else data, scales)


def _matrix(part: Part, data: np.ndarray, scales: np.ndarray | None) -> Matrix:
    return Matrix(data, _format(part, scales is not None), scales)
