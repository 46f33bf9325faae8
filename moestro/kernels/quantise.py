"""Weights in fewer bits, in rows: int8 and int4 in groups with one scale, uint4 with a minimum too, and MXFP4 (OCP Microscaling 1.0, E2M1
elements, E8M0 scales). In numpy: the rules that `packed.quantise` follows in native code, byte for byte."""

from __future__ import annotations

import numpy as np

from moestro.kernels.ffn import GROUPS, Matrix

_MXFP4 = 32
_TOO_LARGE = "these weights are too large for float16 scales; int8 and int4 can have scale_dtype='float32'"


def encode_int8(w_RC: np.ndarray, group: int = 64, *, scale_dtype: str = "float32") -> Matrix:
    """Symmetric int8, scale = max |w| / 127 per group of a row. scale_dtype: 'float32' or 'float16'.

    Raises:
        ValueError: a group that is not 32, 64 or 128 or does not divide the row, or a weight that is not finite.
    """
    w_RC = _checked(w_RC, group, GROUPS)
    return _encode(w_RC, "int8", group, np.dtype(scale_dtype))


def encode_int4(w_RC: np.ndarray, group: int = 32, *, scale_dtype: str = "float32") -> Matrix:
    """Symmetric int4: the weight of largest magnitude becomes -8, so scale = -that / 8 and may be negative (llama.cpp's Q4_0 rule).

    Raises:
        ValueError: as `encode_int8`.
    """
    w_RC = _checked(w_RC, group, GROUPS)
    return _encode(w_RC, "int4", group, np.dtype(scale_dtype))


def encode_uint4(w_RC: np.ndarray, group: int = 32) -> Matrix:
    """Asymmetric four bits: minimum = the least weight, scale = (largest - least) / 15, both float16 (llama.cpp's Q4_1 rule).

    Raises:
        ValueError: as `encode_int8`.
    """
    w_RC = _checked(w_RC, group, GROUPS)
    return _encode(w_RC, "uint4", group, np.dtype(np.float16))


def encode_mxfp4(w_RC: np.ndarray) -> Matrix:
    """MXFP4 in groups of 32: shared exponent floor(log2 max|w|) - 2, elements rounded to nearest even, saturating at 6.

    Raises:
        ValueError: rows that are not multiples of 32, or a weight that is not finite.
    """
    w_RC = _checked(w_RC, _MXFP4, (_MXFP4,))
    return _encode(w_RC, "mxfp4", _MXFP4, np.dtype(np.uint8))


def _checked(w_RC: np.ndarray, group: int, allowed: tuple[int, ...]) -> np.ndarray:
    if group not in allowed or w_RC.ndim != 2 or w_RC.shape[1] % group:
        raise ValueError(f"cannot quantise {w_RC.shape} in groups of {group}; expected a group of {allowed} that divides the row")
    w_RC = np.ascontiguousarray(w_RC, np.float32)
    if not np.isfinite(w_RC).all():
        raise ValueError("cannot quantise weights that hold infinities or not-a-number")
    return w_RC


def _encode(w_RC: np.ndarray, format: str, group: int, scale_dtype: np.dtype) -> Matrix:
    if format != "mxfp4" and scale_dtype.name not in ("float32", "float16"):
        raise ValueError(f"scales are float32 or float16, not {scale_dtype}")
    rows, cols = w_RC.shape
    grouped = w_RC.reshape(rows, cols // group, group)
    top = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1)
    if format == "mxfp4":
        exponent = np.where(top == 0, 0, np.clip(np.frexp(top)[1] - 3, -127, 127) + 127).astype(np.uint8)
        codes = _e2m1(np.ldexp(grouped, 127 - exponent.astype(np.int32)))
        return Matrix(_nibbles(codes.reshape(rows, cols)), format, exponent[:, :, 0], group)
    if format == "uint4":
        return _reference_uint4(grouped, group)
    with np.errstate(over="ignore"):  # a scale beyond float16 is caught below
        scales = (np.abs(top) / np.float32(127) if format == "int8" else top / np.float32(-8)).astype(scale_dtype)
    if not np.isfinite(scales).all():
        raise ValueError(_TOO_LARGE)
    exact = scales.astype(np.float32)
    safe = np.where(exact == 0, np.float32(1), exact)
    whole = np.rint(np.where(exact == 0, np.float32(0), grouped / safe))
    if format == "int8":
        return Matrix(np.clip(whole, -127, 127).astype(np.int8).reshape(rows, cols), format, scales[:, :, 0], group)
    codes = (np.clip(whole, -8, 7) + 8).astype(np.uint8)
    return Matrix(_nibbles(codes.reshape(rows, cols)), format, scales[:, :, 0], group)


def _reference_uint4(w_RGI: np.ndarray, group: int) -> Matrix:
    low, high = w_RGI.min(-1), w_RGI.max(-1)
    with np.errstate(over="ignore"):
        pairs = np.stack([(high - low) / np.float32(15), low + np.float32(0)], -1).astype(np.float16)  # no negative zero
    if not np.isfinite(pairs).all():
        raise ValueError(_TOO_LARGE)
    scale, minimum = pairs[..., :1].astype(np.float32), pairs[..., 1:].astype(np.float32)
    whole = np.rint(np.clip((w_RGI - minimum) / np.where(scale == 0, np.float32(1), scale), 0, 15))
    codes = np.where(scale == 0, 0, whole).astype(np.uint8)
    return Matrix(_nibbles(codes.reshape(len(w_RGI), w_RGI.shape[1] * group)), "uint4", pairs, group)


def _e2m1(values: np.ndarray) -> np.ndarray:
    size = np.abs(values)
    codes = (size > 0.25).astype(np.uint8)
    for threshold, inclusive in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        codes += size >= threshold if inclusive else size > threshold
    return codes | (np.signbit(values).astype(np.uint8) << 3)


def _nibbles(codes_RC: np.ndarray) -> np.ndarray:
    return codes_RC[:, 0::2] | (codes_RC[:, 1::2] << 4)
