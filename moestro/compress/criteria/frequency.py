"""Frequency: an expert is worth as many tokens as choose it.

Paper      Chen et al. 2022, arXiv 2206.00277 (its hit rate); the baseline of every later paper
Idea       What the router never asks for can go.
Rule       score_e = tokens whose slots hold e
Needs      counts
Gives      scores_E
Departs    nothing
Checked    closed form; planted idle experts are found, and half the experts of a planted domain are kept
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.frequency", kind="criterion", paper="2206.00277", needs=("counts",), fidelity="exact")
def frequency(stats: LayerStats) -> np.ndarray:
    """float64 scores_E."""
    return stats.counts()
