"""PreMoe: an expert is worth the router's own enthusiasm for it on the task, counted only where it is among the first.

Paper      Zhu et al. 2025, arXiv 2505.17639
Idea       The logits of the chosen say which experts a task needs; a profile of the task's text is its pattern.
Rule       score_e = mean over tokens of s_e(t); s_e(t) = z_e(t), the router's logit, if e is among the `first` highest logits of t, else 0.
           With a threshold r: s_e = softmax over those of them with z_e >= r
Needs      selection
Gives      scores_E
Departs    with `positive` (the default) a negative logit counts 0: the authors' mean puts an expert that is chosen with negative logits
           below one that is never chosen. The probe fixes `first` and `threshold`, as they have to be known when the text is read
Checked    closed form; keeps a planted domain's experts
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.premoe", kind="criterion", paper="2505.17639", needs=("selection",), fidelity="adapted")
def premoe(stats: LayerStats, *, positive: bool = True) -> np.ndarray:
    """float64 scores_E. positive: count what is above 0 only."""
    name = "selected_positive_LE" if positive else "selected_logits_LE"
    return stats.need("selection", name).astype(np.float64) / stats.tokens
