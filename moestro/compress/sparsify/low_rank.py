"""MC-SMoE's decomposition: a matrix of low rank, and the rows of what is left that matter most.

Paper      Li et al. 2023, arXiv 2310.01334
Idea       Merged experts are lower in rank than what they came from; what the low rank misses is concentrated in few rows.
Rule       W = U V + S with U V the rank-`rank` truncation of the singular value decomposition; of S only the share `kept` of rows stays
Needs      moments
Gives      U V + S as one matrix
Departs    rows of S are chosen by |S_i * norm| in one shot; the paper prunes them by |w dL/dw| while it trains U, V and S. The result is
           stored as one dense matrix, so a file of a transformers family keeps its size
Checked    full rank gives the matrix; the error at rank r is that of the best rank-r matrix; kept = 1 gives the matrix; planted low rank is free
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.sparsify.low_rank", kind="sparsify", paper="2310.01334", needs=("moments", "counts"), fidelity="adapted")
def low_rank(w_RC: np.ndarray, norm_C: np.ndarray, *, rank: int = 32, kept: float = 0.1) -> np.ndarray:
    """float32 [R, C]. kept: share of the rows of S, 0 to 1. Raises InputError."""
    if rank < 1 or not 0 <= kept <= 1:
        raise InputError(f"rank {rank}, kept {kept}", expected="a rank of 1 or more, and a share from 0 to 1")
    u_RK, s_K, v_KC = np.linalg.svd(w_RC.astype(np.float64), full_matrices=False)
    low_RC = (u_RK[:, :rank] * s_K[:rank]) @ v_KC[:rank]
    rest_RC = w_RC - low_RC
    weight_R = np.linalg.norm(rest_RC * (norm_C if norm_C.any() else 1.0), axis=1)
    stay = np.argsort(-weight_R, kind="stable")[: round(kept * len(weight_R))]
    low_RC[stay] += rest_RC[stay]
    return low_RC.astype(np.float32)
