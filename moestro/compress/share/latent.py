"""Latent experts: the gate and up matrices of a group of experts read the same few directions of their input.

Paper      Liu et al. 2025, MoLAE, arXiv 2503.23100
Idea       What experts of a group look at overlaps; one projection for the group, and a small matrix for each, can replace wide ones.
Rule       minimise sum_i ||W^i - A^i B||^2: B = V_m^T, the `rank` first right singular vectors of the group's matrices stacked by rows,
           A^i = W^i V_m; gate and up have a B each, down stays. Groups are `group` consecutive experts, 0 for the whole layer
Needs      nothing
Gives      A^i B as one matrix
Departs    without the paper's first phase, which lowers each expert's own rank before. The result is stored as dense matrices, so a file of a
           transformers family keeps its size; layers.banks.latent trains in the factored form
Checked    planted A^i B are recovered; the error is that of the discarded singular values and no drawn B is better; rank = D changes nothing;
           the right groups beat one for all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertWeights
from moestro.core.method import method

Bases = Sequence[Mapping[str, np.ndarray]]  # of each slot, by role: orthonormal rows [m, C] that its matrix is projected on


@method("compress.share.latent", kind="share", paper="2503.23100", fidelity="adapted")
def latent(read: Sequence[Callable[[], ExpertWeights]], *, rank: int = 64, group: int = 0) -> Bases:
    """read: gives each slot's weights. rank: m, directions of a group. Holds one expert and two D x D matrices. Raises InputError."""
    size = group or len(read)
    if rank < 1 or size < 1 or len(read) % size:
        raise InputError(f"rank {rank}, {len(read)} experts in groups of {size}", expected="a rank of 1 or more, and a divisor")
    bases: list[Mapping[str, np.ndarray]] = []
    for start in range(0, len(read), size):
        sums: dict[str, np.ndarray] = {}
        for weights in (one() for one in read[start : start + size]):
            for role, w_FD in (("gate", weights.gate_FD), ("up", weights.up_FD)):
                if w_FD is not None:
                    wide_FD = np.asarray(w_FD, np.float64)
                    sums[role] = sums.get(role, 0) + wide_FD.T @ wide_FD
        made = {role: np.linalg.eigh(sum_DD)[1][:, ::-1][:, :rank].T for role, sum_DD in sums.items()}
        bases += [made] * size
    return bases
