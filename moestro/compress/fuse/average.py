"""Average: a merged expert is the plain mean of its members.

Paper      Wortsman et al. 2022, arXiv 2203.05482 (uniform soup)
Idea       What weighting by use has to beat.
Rule       W = mean of W_e
Needs      nothing
Gives      coefficients, which sum to 1
Departs    nothing
Checked    closed form
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method


@method("compress.fuse.average", kind="fuse", paper="2203.05482", fidelity="exact")
def average(count_E: np.ndarray) -> np.ndarray:
    """float64 coefficients of a group's members."""
    return np.full(len(count_E), 1 / len(count_E))
