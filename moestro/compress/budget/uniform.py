"""Uniform: every layer keeps the same number of experts.

Paper      none; what REAP, EASY-EP and PreMoe use
Idea       Scores of different layers are rarely comparable, and transformers' configurations hold one number of experts.
Rule       keep_l = total / L, the rest of the division to the first layers
Needs      scores
Gives      keep_L
Departs    nothing
Checked    sums to the total; no layer below its least
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.budget.uniform", kind="budget", fidelity="exact")
def uniform(scores: Sequence[np.ndarray], total: int, least: Sequence[int]) -> list[int]:
    """scores: scores_E of each layer. total: experts kept in all layers together. least: per layer. Raises InputError when it cannot be."""
    layers = len(scores)
    keep = [total // layers + (i < total % layers) for i in range(layers)]
    if any(k < few or k > len(s) for k, few, s in zip(keep, least, scores, strict=True)):
        raise InputError(
            f"{total} experts in {layers} layers are {min(keep)} to {max(keep)} per layer",
            expected=f"at least {max(least)} and at most {min(map(len, scores))} in each",
            fix="give another --keep or --ratio",
        )
    return keep
