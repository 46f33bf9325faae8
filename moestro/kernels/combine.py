"""Expert outputs back to tokens: a weighted sum per token in slot order, the same bits whatever the order of the pairs."""

from __future__ import annotations

import numpy as np

from moestro.kernels import native


def combine(
    out_ND: np.ndarray, token_N: np.ndarray, slot_N: np.ndarray, weight_N: np.ndarray, y_TD: np.ndarray, *, threads: int = 0
) -> None:
    """Fill y_TD: float32 [T, D], the sum over a token's pairs, in slot order, of weight * row; zeros without pairs.

    out_ND: float32. token_N, slot_N: int64, each (token, slot) at most once. weight_N: float32. All contiguous.
    threads: 0 takes all cores.

    Raises:
        ValueError: arrays that do not fit one another, or a token that y_TD has no row for.
    """
    module = native.extension()
    if module is None:
        reference_combine(out_ND, token_N, slot_N, weight_N, y_TD)
    else:
        module.combine(out_ND, token_N, slot_N, weight_N, y_TD, threads or native.cores())


def reference_combine(
    out_ND: np.ndarray, token_N: np.ndarray, slot_N: np.ndarray, weight_N: np.ndarray, y_TD: np.ndarray
) -> None:
    """`combine` in numpy."""
    pairs = len(out_ND)
    if not token_N.shape == slot_N.shape == weight_N.shape == (pairs,) or out_ND.shape[1] != y_TD.shape[1]:
        raise ValueError(
            f"pairs {token_N.shape}, {slot_N.shape}, {weight_N.shape} do not fit rows {out_ND.shape} and {y_TD.shape}"
        )
    if pairs and not (token_N.min() >= 0 and token_N.max() < len(y_TD) and slot_N.min() >= 0):
        raise ValueError(f"tokens {token_N.min()} to {token_N.max()} of {len(y_TD)}, slots from {slot_N.min()}")
    y_TD[...] = 0
    for slot in np.unique(slot_N):
        chosen = np.flatnonzero(slot_N == slot)
        y_TD[token_N[chosen]] += weight_N[chosen, None] * out_ND[chosen]
