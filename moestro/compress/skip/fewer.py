"""Fewer experts per token, layer by layer: a lower top-k where the last experts weigh least.

Paper      none
Idea       k was one number for the whole model when it was trained; at run time a layer whose last expert hardly weighs can do without.
Rule       of all (layer, rank) but each layer's first, the `average` * L with the largest share of their layer's weight stay,
           share_lj = rank_mass_lj / sum_j rank_mass_lj; as shares fall with the rank, k_l of each layer is how many of its ranks stay
Needs      gates
Gives      the tap layers.taps.first for each layer
Departs    nothing
Checked    average = K changes nothing; sum of k_l = average * L; against brute force on small layers; beats the same k everywhere where planted
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.compress.skipping import Skips, renormalised
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError
from moestro.core.layer import LayerFacts
from moestro.core.method import method
from moestro.core.plans.compression import TapUse


@method("compress.skip.fewer", kind="skip", needs=("gates",), fidelity="exact")
def fewer(stats: Sequence[LayerStats], layers: Sequence[LayerFacts], *, average: float = 1.0) -> Skips:
    """average: experts per token, over the layers. Raises InputError, ProfileError."""
    most = sum(facts.top_k for facts in layers)
    total = round(average * len(layers))
    if not len(layers) <= total <= most:
        raise InputError(f"{average:g} experts per token on average", expected=f"1 to {most / len(layers):g}")
    shares = []
    for mine, facts in zip(stats, layers, strict=True):
        mass_K = mine.need("gates", "rank_mass_LK")[: facts.top_k]
        shares.append(mass_K / max(float(mass_K.sum()), 1e-30))
    rest = sorted((-share, i, j) for i, share_K in enumerate(shares) for j, share in enumerate(share_K) if j)
    numbers = np.ones(len(layers), np.int64)
    for _, i, _ in rest[: total - len(layers)]:
        numbers[i] += 1
    return [
        (
            TapUse("layers.taps.first", {"number": int(k), "renormalise": renormalised(facts)}),
            1 - int(k) / facts.top_k,
        )
        for k, facts in zip(numbers, layers, strict=True)
    ]
