"""Effective number of experts: how many would be used if they were used evenly.

Paper      none (Hill numbers of order 1 and 2)
Idea       A layer of 64 experts with two thirds of its traffic on four of them works like a smaller layer.
Rule       by count: exp(-sum p log p) and 1 / sum p^2 of the shares p of slots; by mass: the same of the shares of weight
Needs      counts; with `gates` in the profile also by mass
Gives      per layer the effective numbers
Departs    nothing
Checked    E for even use, 1 for one expert, between them otherwise; order 2 never above order 1
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.effective", kind="measure", fidelity="exact", needs=("counts",))
def effective(profile: Profile) -> Finding:
    """One row per layer."""
    mass_LE = profile.arrays.get("mass_LE")
    rows = []
    for layer, (counts_E, experts) in enumerate(zip(profile.need("counts", "counts_LE"), profile.experts_L.tolist())):
        by_mass = (None, None) if mass_LE is None else hill(np.abs(mass_LE[layer, :experts]))
        rows.append((layer, experts, *hill(counts_E[:experts]), *by_mass))
    return finding(
        ("layer", "experts", "by_count", "by_count_2", "by_mass", "by_mass_2"),
        rows,
        "_2: order 2, which heeds rare experts less.",
    )


def hill(loads_E: np.ndarray) -> tuple[float, float]:
    """Hill numbers of order 1 and 2; 0 when there is no load."""
    total = float(loads_E.sum())
    if total == 0:
        return 0.0, 0.0
    share = loads_E[loads_E > 0] / total
    return float(np.exp(-(share * np.log(share)).sum())), float(1 / (share**2).sum())
