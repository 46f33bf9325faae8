"""Between float32 numbers and what a checkpoint stores: dtypes, and the fused, interleaved or transposed parts of experts."""

from __future__ import annotations

import numpy as np

from moestro.core.experts import ExpertWeights
from moestro.kernels.convert import to_bf16, to_f32
from moestro.models.checkpoint import NUMPY
from moestro.models.layout import Part

FLOATS = ("F32", "F16", "BF16")


def floats(array: np.ndarray, dtype: str) -> np.ndarray:
    """A stored array in float32 (float64 stays)."""
    return to_f32(array) if dtype in FLOATS else array


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to nearest in a stored dtype; BF16 as bit patterns."""
    if dtype == "BF16":
        return to_bf16(np.ascontiguousarray(values, np.float32))
    return np.ascontiguousarray(values, NUMPY[dtype])


def to_part(weights: ExpertWeights, part: Part) -> np.ndarray:
    """What a part of an expert holds, as the file stores it: fused, interleaved, transposed, in its dtype."""
    kind = part.role.removesuffix("_bias")
    bias = part.role.endswith("_bias")
    fields = {"gate": ("gate_F" if bias else "gate_FD",), "up": ("up_F" if bias else "up_FD",)}
    fields |= {"down": ("down_D" if bias else "down_DF",), "gate_up": fields["gate"] + fields["up"]}
    arrays = [getattr(weights, name) for name in fields[kind]]
    if len(arrays) == 1:
        whole = arrays[0]
    elif part.interleaved:
        whole = np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    else:
        whole = np.concatenate(arrays)
    return stored(whole.T if part.transposed and whole.ndim == 2 else whole, part.dtype)
