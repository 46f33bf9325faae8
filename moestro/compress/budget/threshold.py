"""Threshold: one threshold over the shares of all layers' scores, so that a layer in which many experts matter keeps more.

Paper      Li et al. 2023, arXiv 2310.01334 (M-SMoE's adaptive number of groups per layer)
Idea       Layers differ in how many experts carry the work.
Rule       in each layer the scores are divided by their sum; the `least` best of it are raised to 1; of all layers together the `total`
           highest are kept
Needs      scores
Gives      keep_L
Departs    the authors raise one expert per layer, here as many as the layer's router needs; layers can then differ, which transformers
           can only hold when routers keep their width (merging with --router repoint)
Checked    sums to the total; no layer below its least; one layer's scores times a constant change nothing
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.budget.threshold", kind="budget", paper="2310.01334", fidelity="adapted")
def threshold(scores: Sequence[np.ndarray], total: int, least: Sequence[int]) -> list[int]:
    """scores: scores_E of each layer, none negative. total: experts kept in all layers together. Raises InputError when it cannot be."""
    if not sum(least) <= total <= sum(map(len, scores)):
        raise InputError(
            f"{total} experts are to be kept in all layers",
            expected=f"from {sum(least)} to {sum(map(len, scores))}",
            fix="give another --keep or --ratio",
        )
    if any((s < 0).any() for s in scores):
        raise InputError("some scores are negative, so that they have no shares", fix="use the budget uniform")
    ranked = []
    for layer, (score_E, few) in enumerate(zip(scores, least, strict=True)):
        share_E = np.sort(score_E / (score_E.sum() or 1.0))[::-1]
        ranked += [(2.0 if i < few else float(share), -i, layer) for i, share in enumerate(share_E)]
    kept = [layer for _, _, layer in sorted(ranked, reverse=True)[:total]]
    return [kept.count(layer) for layer in range(len(scores))]
