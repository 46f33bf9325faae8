"""MoE-Pruner: within each row the weights go that are small, counted with the inputs they meet and the gate their expert is given.

Paper      Xie et al. 2024, arXiv 2410.12013
Idea       Wanda for experts: a weight matters as much as its input, and an input as much as the router cares for the token.
Rule       S_ij = |W_ij| |x_j g|, |x_j g| = sqrt(sum_t (x_tj g(t))^2) over the expert's tokens; in each row the lowest floor(ratio C) become 0,
           or with a pattern n:m the lowest m - n of every m neighbours
Needs      moments
Gives      the matrix with zeros
Departs    statistics are of the unpruned model: the paper recomputes each layer's inputs after pruning the layers before. An expert that
           saw no token is pruned by magnitude. Zeros are stored as numbers, so the file keeps its size
Checked    gates of 1 give Wanda; each row has exactly its zeros; n:m holds; a common factor of the gates changes nothing
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.sparsify.moe_pruner", kind="sparsify", paper="2410.12013", needs=("moments", "counts"), fidelity="adapted")
def moe_pruner(w_RC: np.ndarray, norm_C: np.ndarray, *, ratio: float = 0.5, pattern: str = "") -> np.ndarray:
    """float32 [R, C]. ratio: share of zeros in a row, without a pattern. pattern: '2:4' and the like: how many of how many stay.

    Raises InputError for a pattern that does not divide the row.
    """
    score_RC = np.abs(w_RC) * (norm_C if norm_C.any() else 1.0)
    rows, cols = w_RC.shape
    if pattern:
        stay, every = _parse(pattern, cols)
        grouped = score_RC.reshape(rows, cols // every, every)
        gone = np.argsort(grouped, axis=2, kind="stable")[:, :, : every - stay]
        keep = np.ones(grouped.shape, bool)
        np.put_along_axis(keep, gone, False, axis=2)
        return np.where(keep.reshape(rows, cols), w_RC, 0).astype(np.float32)
    if not 0 <= ratio < 1:
        raise InputError(f"the ratio of zeros is {ratio}", expected="from 0 to below 1")
    gone = np.argsort(score_RC, axis=1, kind="stable")[:, : int(ratio * cols)]
    out = w_RC.astype(np.float32)
    np.put_along_axis(out, gone, 0, axis=1)
    return out


def _parse(pattern: str, cols: int) -> tuple[int, int]:
    stay, _, every = pattern.partition(":")
    if not (stay.isdigit() and every.isdigit() and 0 < int(stay) < int(every)):
        raise InputError(f"the pattern is {pattern!r}", expected="n:m with n below m, such as 2:4")
    if cols % int(every):
        raise InputError(f"rows of {cols} are no multiple of {every}", fix="use moe_pruner:ratio=0.5 instead")
    return int(stay), int(every)
