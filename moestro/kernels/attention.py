"""Attention of one sequence's queries over its cached keys and values: grouped heads, sliding window, sinks, any cache format.

Law: a query's bits do not depend on the queries beside it or on the threads, so a prompt fed in pieces, token by token or at
once gives the same bits. Keys are taken in spans at fixed places; the spans' partial softmaxes are merged in their order.
"""

from __future__ import annotations

import numpy as np

from moestro.kernels import native
from moestro.kernels.convert import to_f32

SPAN = 128  # keys softened together; spans begin at its multiples (csrc/attention.hpp)
_CACHES = ("float32", "float16", "uint16")


def attend(
    q_THd: np.ndarray,
    keys_SKd: np.ndarray,
    values_SKv: np.ndarray,
    *,
    lengths_T: np.ndarray,
    scale: float,
    window: int = 0,
    sinks_H: np.ndarray | None = None,
    softcap: float = 0.0,
    threads: int = 0,
    out_THv: np.ndarray | None = None,
) -> np.ndarray:
    """out_THv: query t sees keys max(0, lengths_T[t] - window) .. lengths_T[t] (window 0: from the first); zeros when it sees none.

    q_THd, out_THv: float32. keys_SKd, values_SKv: float32, float16 or uint16 (bf16 bits) [S, K, d] and [S, K, v]; H is a
    multiple of K, and query heads H / K * i ... share key head i. Any strides but in the last axis; a cache laid out
    [K, S, d] in memory is read fastest. lengths_T: int64 or int32. scale: of the scores. softcap c: c tanh(score / c).
    sinks_H: one more logit per head that takes weight and gives nothing. What lies beyond the lengths is never used.

    Raises:
        ValueError: arrays that do not fit one another, or a length beyond S.
    """
    if out_THv is None:
        out_THv = np.empty((*q_THd.shape[:2], values_SKv.shape[2]), np.float32)
    module = native.extension()
    if module is None:
        reference_attend(q_THd, keys_SKd, values_SKv, lengths_T, scale, window, sinks_H, softcap, out_THv)
    else:
        module.attend(q_THd, keys_SKd, values_SKv, lengths_T, scale, window, sinks_H, softcap, threads, out_THv)
    return out_THv


def reference_attend(
    q_THd: np.ndarray,
    keys_SKd: np.ndarray,
    values_SKv: np.ndarray,
    lengths_T: np.ndarray,
    scale: float,
    window: int,
    sinks_H: np.ndarray | None,
    softcap: float,
    out_THv: np.ndarray,
) -> None:
    """`attend` in numpy, query by query."""
    _check(q_THd, keys_SKd, values_SKv, lengths_T, window, sinks_H, softcap, out_THv)
    heads, width = q_THd.shape[1:]
    shared = keys_SKd.shape[1]
    sinks = None if sinks_H is None else sinks_H.reshape(shared, heads // shared, 1)
    for q_Hd, length, out_Hv in zip(q_THd, lengths_T, out_THv):
        begin = max(0, int(length) - window) if window else 0
        if begin >= length:
            out_Hv[...] = 0
            continue
        keys_KdS = to_f32(keys_SKd[begin:length]).transpose(1, 2, 0)
        values_KSv = to_f32(values_SKv[begin:length]).transpose(1, 0, 2)
        scores_KGS = np.matmul(q_Hd.reshape(shared, -1, width), keys_KdS) * np.float32(scale)
        if softcap:
            scores_KGS = np.float32(softcap) * np.tanh(scores_KGS / np.float32(softcap))
        top = scores_KGS.max(axis=2, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, sinks)
        weights_KGS = np.exp(scores_KGS - top)
        total = weights_KGS.sum(axis=2, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks - top)
        out_Hv[...] = (np.matmul(weights_KGS, values_KSv) / total).reshape(out_Hv.shape)


def _check(
    q_THd: np.ndarray,
    keys_SKd: np.ndarray,
    values_SKv: np.ndarray,
    lengths_T: np.ndarray,
    window: int,
    sinks_H: np.ndarray | None,
    softcap: float,
    out_THv: np.ndarray,
) -> None:
    for name, array, kinds in (("q", q_THd, ("float32",)), ("keys", keys_SKd, _CACHES), ("values", values_SKv, _CACHES),
                               ("out", out_THv, ("float32",))):  # fmt: skip
        if array.dtype.name not in kinds or array.ndim != 3 or (array.size and array.strides[2] != array.itemsize):
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}, strides {array.strides}; expected 3 axes of {' or '.join(kinds)}"
            )
    tokens, heads, width = q_THd.shape
    length, shared, _ = keys_SKd.shape
    if keys_SKd.shape[2] != width or values_SKv.shape[:2] != (length, shared) or shared == 0 or heads % shared:
        raise ValueError(f"queries {q_THd.shape}, keys {keys_SKd.shape} and values {values_SKv.shape} do not fit one another")
    if out_THv.shape != (tokens, heads, values_SKv.shape[2]):
        raise ValueError(f"out is {out_THv.shape}; expected {(tokens, heads, values_SKv.shape[2])}")
    if lengths_T.dtype not in (np.int64, np.int32) or lengths_T.shape != (tokens,):
        raise ValueError(f"lengths are {lengths_T.dtype} {lengths_T.shape}; expected int64 {(tokens,)}")
    if tokens and (int(lengths_T.min()) < 0 or int(lengths_T.max()) > length):
        raise ValueError(f"lengths reach from {lengths_T.min()} to {lengths_T.max()}; the cache holds {length}")
    if sinks_H is not None and (sinks_H.dtype != np.float32 or sinks_H.shape != (heads,)):
        raise ValueError(f"sinks are {sinks_H.dtype} {sinks_H.shape}; expected float32 ({heads},)")
    if window < 0 or softcap < 0:
        raise ValueError(f"window {window} and softcap {softcap} must not be negative")
