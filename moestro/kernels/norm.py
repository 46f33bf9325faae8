"""Root-mean-square normalisation of rows (arXiv 1910.07467), alone or fused with the residual sum before it."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def rms_norm(
    x_TD: np.ndarray, weight_D: np.ndarray, eps: float, *, out_TD: np.ndarray | None = None, plus_one: bool = False
) -> np.ndarray:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x_TD: float32, two axes or three (heads [T, H, d]), the last contiguous. out_TD: may be x_TD itself. weight_D: float32.
    plus_one: the weight is stored as its distance from one.

    Raises:
        ValueError: arrays that do not fit one another.
    """
    if out_TD is None:
        out_TD = np.empty(x_TD.shape, np.float32)
    module = native.extension()
    if module is None:
        _reference(x_TD, weight_D, eps, out_TD, plus_one)
    else:
        module.rms_norm(x_TD, weight_D, eps, out_TD, plus_one)
    return out_TD


def add_rms_norm(
    x_TD: np.ndarray,
    y_TD: np.ndarray,
    weight_D: np.ndarray,
    eps: float,
    *,
    scale: float = 1.0,
    out_TD: np.ndarray | None = None,
    plus_one: bool = False,
) -> np.ndarray:
    """x_TD += scale * y_TD in place, then `rms_norm` of x_TD. Two axes.

    Raises:
        ValueError: arrays that do not fit one another.
    """
    if out_TD is None:
        out_TD = np.empty(x_TD.shape, np.float32)
    module = native.extension()
    if module is not None:
        module.add_rms_norm(x_TD, y_TD, scale, weight_D, eps, out_TD, plus_one)
        return out_TD
    if y_TD.dtype != np.float32 or y_TD.shape != x_TD.shape or x_TD.ndim != 2:
        raise ValueError(f"cannot add {y_TD.dtype} {y_TD.shape} to float32 {x_TD.shape}")
    x_TD += np.float32(scale) * y_TD
    _reference(x_TD, weight_D, eps, out_TD, plus_one)
    return out_TD


def _reference(x_TD: np.ndarray, weight_D: np.ndarray, eps: float, out_TD: np.ndarray, plus_one: bool) -> None:
    width = x_TD.shape[-1]
    for name, array, shape in (("x", x_TD, x_TD.shape), ("out", out_TD, x_TD.shape), ("weight", weight_D, (width,))):
        if array.dtype != np.float32 or array.shape != shape or (array.size and array.strides[-1] != 4):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, strides {array.strides}; expected float32 {shape}")
    if x_TD.ndim not in (2, 3):
        raise ValueError(f"x has {x_TD.ndim} axes; expected two or three")
    weight_D = weight_D + np.float32(1) if plus_one else weight_D
    mean = np.mean(np.square(x_TD), axis=-1, keepdims=True)
    np.multiply(x_TD / np.sqrt(mean + np.float32(eps)), weight_D, out=out_TD)
