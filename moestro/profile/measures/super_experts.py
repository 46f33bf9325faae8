"""Super Experts: the few experts whose outputs hold extreme values.

Paper      Su et al. 2025, arXiv 2507.23279
Idea       Massive activations of the residual stream are made by a handful of experts; pruning or crushing them ruins the model.
Rule       With a the largest |output| of each expert in the first `share` of the MoE layers: super iff a > P99.5(a) and a > max(a) / 10.
           Ratio guard (ours): nothing is reported while max(a) / median(a) is below `guard`
Needs      maxima
Gives      the super experts, largest first, with a, a / median and a / P99.5
Departs    the guard, as with fewer than 200 experts the rule alone always names the largest; division is not rounded; 0 turns it off
Checked    one expert scaled by 50 among 200 and more is found alone; a common scale changes nothing; at most ceil(0.5 %) are named
"""

from __future__ import annotations

import math

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.super_experts", kind="measure", paper="2507.23279", fidelity="adapted", needs=("maxima",))
def super_experts(
    profile: Profile, *, share: float = 0.75, percentile: float = 99.5, factor: float = 10.0, guard: float = 10.0
) -> Finding:
    """share: of the MoE layers, from the first. factor: how far below the largest. guard: least ratio of largest to median."""
    if not 0 < share <= 1 or not 0 <= percentile <= 100 or factor <= 0:
        raise InputError(f"share {share}, percentile {percentile}, factor {factor}", expected="0-1, 0-100 and above 0")
    most_LE = profile.need("maxima", "output_most_LE")
    layers = max(1, math.ceil(share * len(most_LE)))
    keys = [(la, e) for la in range(layers) for e in range(profile.experts_L[la])]
    values = np.array([float(most_LE[key]) for key in keys])
    seen = values[values > 0]
    if not len(seen):
        return finding(("layer", "expert", "largest", "to_median", "to_percentile"), [], "no expert was seen")
    middle, edge = float(np.median(seen)), float(np.percentile(values, percentile))
    ratio = float(values.max() / middle)
    order = np.argsort(-values, kind="stable")
    found = [i for i in order if values[i] > edge and values[i] > values.max() / factor and ratio >= guard]
    rows = [(*keys[i], values[i], values[i] / middle, values[i] / edge) for i in found]
    told = f"largest output {values.max():.4g}, {ratio:.3g} times the median of {len(seen)} seen experts in the first {layers} MoE layers"
    return finding(
        ("layer", "expert", "largest", "to_median", "to_percentile"),
        rows,
        told + (f"; below {guard:g} times, so nothing is called super" if ratio < guard else ""),
    )
