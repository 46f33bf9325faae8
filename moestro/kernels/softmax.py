"""Softmax and sigmoid of router scores, row by row."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def softmax(scores_TE: np.ndarray) -> np.ndarray:
    """float32 [T, E]: each row's exponentials over their sum. scores_TE: float32, contiguous rows."""
    module = native.extension()
    out_TE = np.empty(scores_TE.shape, np.float32)
    if module is not None:
        module.softmax(scores_TE, out_TE)
        return out_TE
    _check(scores_TE)
    if scores_TE.size:
        np.exp(scores_TE - scores_TE.max(axis=1, keepdims=True), out=out_TE)
        out_TE /= out_TE.sum(axis=1, keepdims=True)
    return out_TE


def sigmoid(scores_TE: np.ndarray) -> np.ndarray:
    """float32 [T, E]: 1 / (1 + e^-score). scores_TE: float32, contiguous rows."""
    module = native.extension()
    out_TE = np.empty(scores_TE.shape, np.float32)
    if module is not None:
        module.sigmoid(scores_TE, out_TE)
        return out_TE
    _check(scores_TE)
    decay = np.exp(-np.abs(scores_TE))
    return np.where(scores_TE >= 0, 1 / (1 + decay), decay / (1 + decay)).astype(np.float32)


def _check(scores_TE: np.ndarray) -> None:
    if scores_TE.dtype != np.float32 or scores_TE.ndim != 2 or (scores_TE.size and scores_TE.strides[1] != 4):
        raise ValueError(f"scores are {scores_TE.dtype} {scores_TE.shape}, strides {scores_TE.strides}; expected float32 [T, E]")
