"""Number formats and layouts: bf16 and f16 to float32 and back, and raw expert matrices turned output rows first."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native

_SMALL = 1 << 14  # elements below which a call into native code is not worth it


def to_f32(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """float32 array of the same shape. values: uint16 (bf16 bit patterns), float16 or float32; any layout.

    out: a C-contiguous float32 array to fill. Without it float32 input is returned as it is.
    """
    if values.dtype == np.float32 and out is None:
        return values
    if out is None:
        out = np.empty(values.shape, np.float32)
    assert out.shape == values.shape and out.dtype == np.float32 and out.flags.c_contiguous
    module = native.extension()
    if module is None or values.size < _SMALL or not values.flags.c_contiguous or values.dtype not in (np.uint16, np.float16):
        return reference_to_f32(values, out)
    module.to_f32(values.ctypes.data, out.ctypes.data, values.size, values.dtype == np.float16, native.cores())
    return out


def reference_to_f32(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`to_f32` in numpy. Raises TypeError for other dtypes."""
    if values.dtype == np.uint16:
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    elif values.dtype in (np.float16, np.float32):
        out[...] = values
    else:
        raise TypeError(f"cannot convert {values.dtype} to float32; expected uint16 (bf16 bits), float16 or float32")
    return out


def to_bf16(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint16 bf16 bit patterns of a float32 array, rounded to nearest, ties to even; NaN stays NaN."""
    assert values.dtype == np.float32
    if out is None:
        out = np.empty(values.shape, np.uint16)
    assert out.shape == values.shape and out.dtype == np.uint16 and out.flags.c_contiguous
    module = native.extension()
    if module is None or values.size < _SMALL or not values.flags.c_contiguous:
        return reference_to_bf16(values, out)
    module.to_bf16(values.ctypes.data, out.ctypes.data, values.size, native.cores())
    return out


def reference_to_bf16(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`to_bf16` in numpy."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out[...] = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return out


def transpose(matrix_IO: np.ndarray, out: np.ndarray | None = None, *, step: int = 1, first: int = 0) -> np.ndarray:
    """C-contiguous [O', I] of matrix_IO[:, first::step]; any dtype of 1, 2 or 4 bytes.

    matrix_IO: [in, out], columns contiguous, rows at any stride.
    """
    picked = matrix_IO[:, first::step]
    if out is None:
        out = np.empty((picked.shape[1], picked.shape[0]), matrix_IO.dtype)
    assert out.shape == picked.shape[::-1] and out.dtype == matrix_IO.dtype and out.flags.c_contiguous
    module = native.extension()
    usual = matrix_IO.strides[1] == matrix_IO.itemsize and matrix_IO.strides[0] >= 0 and matrix_IO.itemsize in (1, 2, 4)
    if module is None or picked.size < _SMALL or not usual:
        out[...] = picked.T
        return out
    address = matrix_IO.ctypes.data + first * matrix_IO.itemsize
    rows, cols = picked.shape
    module.transpose(address, matrix_IO.strides[0], step, rows, cols, matrix_IO.itemsize, out.ctypes.data, native.cores())
    return out


def split_gate_up(raw: np.ndarray, *, transposed: bool, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """(gate_FD, up_FD) of a fused matrix, output rows first; axis 1 is contiguous, rows may be strided views of `raw`.

    raw: [2F, D], or [D, 2F] when `transposed`. Gate's F outputs come first, then up's; `interleaved`: even gate, odd up.
    Only transposed matrices are copied.
    """
    outputs = raw.shape[1 if transposed else 0]
    assert outputs % 2 == 0, f"a fused matrix has an even number of outputs, not {outputs}"
    half = outputs // 2
    if transposed and interleaved:
        return transpose(raw, step=2), transpose(raw, step=2, first=1)
    if transposed:
        return transpose(raw[:, :half]), transpose(raw[:, half:])
    if interleaved:
        return raw[0::2], raw[1::2]
    return raw[:half], raw[half:]
