"""Routers: how sure each layer's router is, and how it spreads weight over its slots.

Paper      none
Idea       Entropy says how undecided a router is over all experts, the margin how close the first expert left out came.
Rule       means over tokens of entropy / log E, of K-th minus (K + 1)-th logit, of logsumexp; share of tokens with a margin below 0.25;
           share of the combine weight at the heaviest slot
Needs      entropy; with `gates` in the profile also the heaviest slot's share
Gives      per layer these means
Departs    nothing
Checked    uniform logits give an entropy of 1 and a margin of 0
"""

from __future__ import annotations

import math

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.routers", kind="measure", fidelity="exact", needs=("entropy",))
def routers(profile: Profile) -> Finding:
    """One row per layer."""
    tokens_L = profile.need("entropy", "routed_L")
    mass_LK = profile.arrays.get("rank_mass_LK")
    rows = []
    for layer, experts in enumerate(profile.experts_L.tolist()):
        n = max(1, int(tokens_L[layer]))
        entropy, margin, lse = (
            float(profile.need("entropy", name)[layer]) / n for name in ("entropy_L", "margin_L", "log_sum_exp_L")
        )
        close = int(profile.need("entropy", "margins_LB")[layer, 0]) / n
        first = None if mass_LK is None or not mass_LK[layer].sum() else float(mass_LK[layer, 0] / mass_LK[layer].sum())
        rows.append((layer, entropy / math.log(experts) if experts > 1 else 0.0, margin, close, lse, first))
    return finding(
        ("layer", "entropy", "margin", "close", "log_sum_exp", "heaviest"),
        rows,
        "entropy: of the softmax of the logits over log E; 1 is undecided. close: share of tokens with a margin below 0.25.",
    )
