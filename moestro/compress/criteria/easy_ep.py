"""EASY-EP: an expert is worth its weighted outputs on the tokens whose meaning the layer turned.

Paper      Dong et al. 2025, arXiv 2504.06792
Idea       A few demonstrations of a domain show which experts matter for it, if tokens that the layer leaves as they were count nothing.
Rule       score_e = sum_t max(0, 1 - cos(r_t, r_t + y_t)) g_e(t) |E_e(x_t)|, y the routed experts' sum; divided by the layer's total
Needs      contribution
Gives      scores_E, which sum to 1 per layer, so that profiles of several domains can be added
Departs    in a model that scales its residual branches the scale is not applied to y
Checked    closed form; a never chosen expert has 0; keeps a planted domain's experts from a handful of tokens
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.easy_ep", kind="criterion", paper="2504.06792", needs=("contribution",), fidelity="adapted")
def easy_ep(stats: LayerStats) -> np.ndarray:
    """float64 scores_E."""
    score_E = stats.need("contribution", "contribution_LE").astype(np.float64)
    return score_E / (score_E.sum() or 1.0)
