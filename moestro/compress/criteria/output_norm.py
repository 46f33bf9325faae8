"""Output norm: an expert is worth the total length of its outputs, whatever their weights.

Paper      Jaiswal et al. 2025, arXiv 2504.05586 (expert activation norm)
Idea       Experts that say little can go, however the router weighs them.
Rule       score_e = sum over the tokens that chose e of |E_e(x_t)|
Needs      norms
Gives      scores_E
Departs    nothing
Checked    closed form; scaling an expert's output scales its score
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.output_norm", kind="criterion", paper="2504.05586", needs=("norms",), fidelity="faithful")
def output_norm(stats: LayerStats) -> np.ndarray:
    """float64 scores_E."""
    return stats.need("norms", "norm_LE").astype(np.float64)
