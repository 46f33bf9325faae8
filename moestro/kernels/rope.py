"""Rotary position embedding (arXiv 2104.09864), in place, on all or some of each head's dimensions."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def rotate(x_THd: np.ndarray, cos_TR: np.ndarray, sin_TR: np.ndarray, *, interleaved: bool = False, start: int = 0) -> None:
    """Rotate dimensions start .. start + R of every head of x_THd in place.

    Dimensions i and i + R/2 turn together, or 2i and 2i + 1 when `interleaved`, by the angle of column i < R/2; the tables'
    second half repeats the first, as transformers makes them, and is not read. float32, the last axis contiguous.

    Raises:
        ValueError: arrays that do not fit one another, or an odd R.
    """
    module = native.extension()
    if module is not None:
        module.rotate(x_THd, cos_TR, sin_TR, interleaved, start)
        return
    rotated = cos_TR.shape[1]
    if x_THd.dtype != np.float32 or x_THd.ndim != 3 or (x_THd.size and x_THd.strides[2] != 4):
        raise ValueError(f"x is {x_THd.dtype} {x_THd.shape}, strides {x_THd.strides}; expected float32 [T, H, d]")
    for name, table in (("cos", cos_TR), ("sin", sin_TR)):
        if table.dtype != np.float32 or table.shape != (len(x_THd), rotated) or (table.size and table.strides[1] != 4):
            raise ValueError(f"{name} is {table.dtype} {table.shape}; expected float32 [{len(x_THd)}, {rotated}]")
    if rotated % 2 or start < 0 or start + rotated > x_THd.shape[2]:
        raise ValueError(f"cannot rotate dimensions {start} to {start + rotated} of {x_THd.shape[2]}")
    half = rotated // 2
    part = x_THd[:, :, start : start + rotated]
    first, second = (part[..., 0::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
    cos, sin = cos_TR[:, None, :half], sin_TR[:, None, :half]
    turned = first * cos - second * sin
    second[...] = second * cos + first * sin
    first[...] = turned
