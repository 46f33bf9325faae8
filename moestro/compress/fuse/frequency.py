"""Frequency: a merged expert is the mean of its members, each counted as often as it is used.

Paper      Li et al. 2023, arXiv 2310.01334
Idea       The members that do most of the work should change least.
Rule       W = sum_e f_e W_e / sum_e f_e, f the tokens that chose e; equal parts when none was ever chosen
Needs      counts
Gives      coefficients, which sum to 1
Departs    equal parts where none was ever chosen; the paper's small number in the divisor would leave such a group without weights
Checked    closed form; sums to 1; a member that was never used adds nothing
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method


@method("compress.fuse.frequency", kind="fuse", paper="2310.01334", needs=("counts",), fidelity="faithful")
def frequency(count_E: np.ndarray) -> np.ndarray:
    """float64 coefficients of a group's members, from their counts."""
    total = count_E.sum()
    return count_E / total if total > 0 else np.full(len(count_E), 1 / len(count_E))
