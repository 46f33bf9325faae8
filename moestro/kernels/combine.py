"""Expert outputs back to tokens: a weighted sum per token in slot order, the same bits whatever the order of the pairs."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def combine(out_ND: np.ndarray, token_N: np.ndarray, slot_N: np.ndarray, weight_N: np.ndarray, y_TD: np.ndarray) -> None:
    """Fill y_TD: float32 [T, D], the sum over a token's pairs, in slot order, of weight * row; zeros without pairs.

    out_ND: float32. token_N, slot_N: int64, each (token, slot) at most once. weight_N: float32.
    """
    pairs, width = out_ND.shape
    assert out_ND.dtype == y_TD.dtype == np.float32 and y_TD.shape[1] == width
    assert token_N.shape == slot_N.shape == weight_N.shape == (pairs,)
    token_N, slot_N = np.ascontiguousarray(token_N, np.int64), np.ascontiguousarray(slot_N, np.int64)
    weight_N = np.ascontiguousarray(weight_N, np.float32)
    module = native.extension()
    if module is None or not (out_ND.flags.c_contiguous and y_TD.flags.c_contiguous):
        return reference_combine(out_ND, token_N, slot_N, weight_N, y_TD)
    if pairs:
        assert token_N.min() >= 0 and token_N.max() < len(y_TD) and slot_N.min() >= 0
    arrays = (out_ND, token_N, slot_N, weight_N, y_TD)
    slots = int(slot_N.max()) + 1 if pairs else 0
    module.combine(*(array.ctypes.data for array in arrays), pairs, len(y_TD), width, slots, native.cores())
    return None


def reference_combine(
    out_ND: np.ndarray, token_N: np.ndarray, slot_N: np.ndarray, weight_N: np.ndarray, y_TD: np.ndarray
) -> None:
    """`combine` in numpy."""
    y_TD[...] = 0
    for slot in np.unique(slot_N):
        chosen = np.flatnonzero(slot_N == slot)
        y_TD[token_N[chosen]] += weight_N[chosen, None] * out_ND[chosen]
