"""Gate mass: an expert is worth the weight it is given.

Paper      Chen et al. 2022, arXiv 2206.00277 (its alpha score)
Idea       Being chosen last with a small weight counts for less than being chosen first.
Rule       score_e = sum over tokens of g_e(t), the weight its output is multiplied with
Needs      gates
Gives      scores_E
Departs    nothing
Checked    closed form; equal weights give the order of frequency
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.gate_mass", kind="criterion", paper="2206.00277", needs=("gates",), fidelity="exact")
def gate_mass(stats: LayerStats) -> np.ndarray:
    """float64 scores_E."""
    return stats.need("gates", "mass_LE").astype(np.float64)
