"""Products of activation rows with weight matrices in any supported number format; several matrices may share the rows in one call.

Law: a row's bits do not depend on the other rows, on the matrices beside it or on the threads: every sum runs over its
inputs in one fixed order. One row streams the weights once, as they are stored; many rows expand them tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.kernels import native
from moestro.kernels.ffn import Matrix
from moestro.kernels.packed import Packed


def linear(
    x_TC: np.ndarray,
    weight: Matrix | Packed,
    *,
    out_TR: np.ndarray | None = None,
    bias_R: np.ndarray | None = None,
    threads: int = 0,
) -> np.ndarray:
    """out_TR = x_TC weight^T + bias_R.

    x_TC, out_TR, bias_R: float32; rows at any stride. out_TR is made when not given. threads: 0 takes all cores.

    Raises:
        ValueError: arrays that do not fit one another.
    """
    if out_TR is None:
        out_TR = np.empty((x_TC.shape[0], weight.rows), np.float32)
    module = native.extension()
    if module is None:
        reference_linear(x_TC, weight, out_TR, bias_R)
    else:
        module.linear(x_TC, weight.handle or weight.bind(module), out_TR, bias_R, threads)
    return out_TR


def linears(
    x_TC: np.ndarray,
    weights: Sequence[Matrix | Packed],
    *,
    outs: Sequence[np.ndarray] | None = None,
    biases: Sequence[np.ndarray | None] | None = None,
    threads: int = 0,
) -> list[np.ndarray]:
    """[x_TC weight^T + bias for each weight] in one call, for queries, keys and values, or gate and up. Arrays as in `linear`.

    Raises:
        ValueError: arrays that do not fit one another, or lists of different lengths.
    """
    made = [np.empty((x_TC.shape[0], weight.rows), np.float32) for weight in weights] if outs is None else list(outs)
    terms = [None] * len(weights) if biases is None else list(biases)
    if not len(weights) == len(made) == len(terms):
        raise ValueError(f"{len(weights)} matrices, {len(made)} outputs and {len(terms)} biases do not fit one another")
    module = native.extension()
    if module is None:
        for weight, out_TR, bias_R in zip(weights, made, terms):
            reference_linear(x_TC, weight, out_TR, bias_R)
    elif made:
        module.linears(x_TC, [weight.handle or weight.bind(module) for weight in weights], made, terms, threads)
    return made


def reference_linear(x_TC: np.ndarray, weight: Matrix | Packed, out_TR: np.ndarray, bias_R: np.ndarray | None) -> None:
    """`linear` in numpy: row by row, for a matrix product's bits depend on how many rows it has."""
    for name, array, shape in (("x", x_TC, (len(x_TC), weight.cols)), ("out", out_TR, (len(x_TC), weight.rows))):
        if array.dtype != np.float32 or array.shape != shape or (array.size and array.strides[1] != 4):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, strides {array.strides}; expected float32 rows {shape}")
    if bias_R is not None and (bias_R.dtype != np.float32 or bias_R.shape != (weight.rows,)):
        raise ValueError(f"the bias is {bias_R.dtype} {bias_R.shape}; expected float32 {(weight.rows,)}")
    product = weight.reference()
    for x_C, out_R in zip(x_TC, out_TR):
        out_R[...] = product(np.ascontiguousarray(x_C))
        if bias_R is not None:
            out_R += bias_R
