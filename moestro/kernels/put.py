"""Writes new keys or values into a cache, rounded to its number format."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native
from moestro.kernels.convert import to_bf16


def put(room_KSd: np.ndarray, rows_TKd: np.ndarray, at: int) -> None:
    """room_KSd[:, at : at + T] = rows_TKd, heads first; rounded to nearest, ties to even.

    room_KSd: float32, float16 or uint16 (bf16 bits). rows_TKd: float32. Any strides but in the last axis.

    Raises:
        ValueError: arrays that do not fit one another.
    """
    module = native.extension()
    if module is None:
        reference_put(room_KSd, rows_TKd, at)
    else:
        module.put(room_KSd, rows_TKd, at)


def reference_put(room_KSd: np.ndarray, rows_TKd: np.ndarray, at: int) -> None:
    """`put` in numpy."""
    heads, positions, width = room_KSd.shape
    if rows_TKd.shape[1:] != (heads, width) or at < 0 or at + len(rows_TKd) > positions:
        raise ValueError(f"rows {rows_TKd.shape} at {at} do not fit a room of {room_KSd.shape}")
    rows_KTd = rows_TKd.transpose(1, 0, 2)
    with np.errstate(over="ignore"):  # float16 reaches infinity, as in native code
        room_KSd[:, at : at + len(rows_TKd)] = to_bf16(rows_KTd) if room_KSd.dtype == np.uint16 else rows_KTd
