"""The k largest scores of each row, in descending order, ties to the lower id."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def topk(scores_TE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids_TK int64 and values_TK float32. NaN counts as smaller than everything.

    Raises:
        ValueError: k is not within 0..E.
    """
    tokens, experts = scores_TE.shape
    if not 0 <= k <= experts:
        raise ValueError(f"cannot take the {k} best of {experts} scores")
    scores_TE = np.ascontiguousarray(scores_TE, np.float32)
    module = native.extension()
    if module is None:
        return reference_topk(scores_TE, k)
    ids_TK, values_TK = np.empty((tokens, k), np.int64), np.empty((tokens, k), np.float32)
    module.topk(scores_TE, ids_TK, values_TK)
    return ids_TK, values_TK


def reference_topk(scores_TE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`topk` in numpy."""
    ids_TK = np.argsort(-scores_TE, axis=1, kind="stable")[:, :k].astype(np.int64)
    return ids_TK, np.take_along_axis(scores_TE, ids_TK, axis=1)
