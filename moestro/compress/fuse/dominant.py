"""Dominant: of a group only the most used expert stays as it is; the others are removed.

Paper      Huang et al. 2024, arXiv 2409.01483 (UNCURL), pruning instead of merging within a cluster
Idea       With groups of experts alike, one of each group can stand for all, and nothing is averaged.
Rule       coefficient 1 for the member that most tokens chose, 0 for the rest
Needs      counts
Gives      coefficients
Departs    the paper's own rule is not published in detail; this is the reading of its abstract
Checked    closed form; duplicated experts lose nothing
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method


@method("compress.fuse.dominant", kind="fuse", paper="2409.01483", needs=("counts",), fidelity="adapted")
def dominant(count_E: np.ndarray) -> np.ndarray:
    """float64 coefficients of a group's members; ties go to the first."""
    return (np.arange(len(count_E)) == np.argmax(count_E)).astype(np.float64)
