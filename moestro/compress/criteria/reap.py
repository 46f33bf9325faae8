"""REAP: an expert is worth the mean length of what it adds to the tokens that choose it.

Paper      Lasby et al. 2025, arXiv 2510.13999
Idea       Removing an expert costs most where its weighted output is large; the mean over its own tokens does not punish rare experts.
Rule       score_e = mean over the tokens that chose e of g_e(t) |E_e(x_t)|
Needs      norms, counts
Gives      scores_E
Departs    nothing
Checked    closed form; scaling an expert's output scales its score; seeing every token twice changes nothing
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.reap", kind="criterion", paper="2510.13999", needs=("norms", "counts"), fidelity="exact")
def reap(stats: LayerStats) -> np.ndarray:
    """float64 scores_E; 0 for an expert that no token chose."""
    return stats.means("norms", "gated_norm_LE")
