"""QuantMoE-Bench's outlier-aware bits: experts whose matrices hold outlying columns get more.

Paper      Li et al. 2024, arXiv 2406.08155
Idea       A weight far larger than the others of its column makes the scale of its group coarse, so such matrices suffer most from few bits.
Rule       score_e = max over its matrices and columns j of max_i |W_ij| / mean_i |W_ij|; experts by falling score get the most bits as long
           as the bytes last, all others the fewest
Needs      the evidence of widths: outlier_LE
Gives      the width of each expert, the first or the last
Departs    scores are of experts, not of single linears, so that an expert's matrices have one width
Checked    a planted outlier comes first; the bytes are spent as far as they go
"""

from __future__ import annotations

import numpy as np

from moestro.compress.evidence import BitsEvidence
from moestro.core.method import method


@method("compress.budget.quantmoe_bench", kind="bits", fidelity="adapted", paper="2406.08155", needs=("inputs",))
def quantmoe_bench(evidence: BitsEvidence, budget: int) -> np.ndarray:
    """widths_LE. budget: bytes of all experts."""
    return by_rank(evidence, budget, evidence.outlier_LE)


def by_rank(evidence: BitsEvidence, budget: int, score_LE: np.ndarray) -> np.ndarray:
    """The most bits for experts by falling score, the fewest for the rest."""
    evidence.check(budget)
    there_LE, last = evidence.there_LE, evidence.bytes_LW.shape[1] - 1
    widths_LE = np.zeros(there_LE.shape, np.int64)
    left = budget - evidence.spent(widths_LE)
    order = np.argsort(-np.where(there_LE, score_LE, -np.inf), axis=None, kind="stable")[: there_LE.sum()]
    for layer, expert in zip(*np.unravel_index(order, there_LE.shape), strict=True):
        more = int(evidence.bytes_LW[layer, last] - evidence.bytes_LW[layer, 0])
        if more <= left:
            widths_LE[layer, expert] = last
            left -= more
    return widths_LE
