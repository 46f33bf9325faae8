"""Balance: how evenly a layer's experts are used.

Paper      MaxVio: Wang et al. 2024, arXiv 2408.15664
Idea       An uneven layer wastes experts and waits for its busiest one; an even one is not better by that alone.
Rule       With loads c_e and their mean m: MaxVio = max c / m - 1; Gini = sum_ij |c_i - c_j| / (2 E^2 m); KL = sum p_e log(E p_e) in nats
Needs      counts
Gives      per layer MaxVio, Gini, KL to uniform, share of experts never chosen
Departs    nothing
Checked    even loads give 0, 0, 0; all on one expert gives E - 1, 1 - 1 / E, log E
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.balance", kind="measure", paper="2408.15664", fidelity="exact", needs=("counts",))
def balance(profile: Profile) -> Finding:
    """One row per layer."""
    rows = []
    for layer, (counts_E, experts) in enumerate(zip(profile.need("counts", "counts_LE"), profile.experts_L.tolist())):
        rows.append((layer, *evenness(counts_E[:experts]), float((counts_E[:experts] == 0).mean())))
    return finding(
        ("layer", "max_vio", "gini", "kl", "never"),
        rows,
        "max_vio, gini, kl: 0 is even. With few tokens an even router looks uneven: expect a kl of about (E - 1) / (2 x slots counted).",
    )


def evenness(counts_E: np.ndarray) -> tuple[float, float, float]:
    """(MaxVio, Gini, KL to uniform in nats); zeros when nothing was counted."""
    total, experts = float(counts_E.sum()), len(counts_E)
    if total == 0:
        return 0.0, 0.0, 0.0
    share_E = np.sort(counts_E / total)
    gini = float(((2 * np.arange(1, experts + 1) - experts - 1) * share_E).sum() / experts)
    used = share_E[share_E > 0]
    return float(share_E[-1] * experts - 1), gini, float((used * np.log(used * experts)).sum())
