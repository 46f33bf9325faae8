"""Redundancy: which experts of a layer do the same.

Paper      Kornblith et al. 2019, arXiv 1905.00414 (linear CKA)
Idea       Two experts that answer alike to every input are one expert stored twice.
Rule       CKA_ij = HSIC_ij / sqrt(HSIC_ii HSIC_jj) from the unbiased HSIC; redundancy = share of experts whose nearest other expert is
           above `threshold`; rank = (sum of eigenvalues of the CKA matrix)^2 / sum of their squares, an effective number of kinds
Needs      similarity
Gives      per layer redundancy, mean and largest CKA and cosine, the nearest pair, and the effective number of kinds
Departs    nothing
Checked    planted duplicates are the nearest pair with CKA 1; independent random experts stay below the threshold
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.redundancy", kind="measure", paper="1905.00414", fidelity="exact", needs=("similarity",))
def redundancy(profile: Profile, *, threshold: float = 0.95) -> Finding:
    """One row per layer."""
    hsic_LEE, cosine_LEE = profile.need("similarity", "hsic_LEE"), profile.need("similarity", "cosine_LEE")
    tokens_L = profile.need("similarity", "compared_L")
    rows = []
    for layer, experts in enumerate(profile.experts_L.tolist()):
        if experts < 2:
            continue
        cka_EE = cka(hsic_LEE[layer, :experts, :experts])
        apart_EE = np.where(np.eye(experts, dtype=bool), -np.inf, cka_EE)
        first, second = np.unravel_index(int(apart_EE.argmax()), apart_EE.shape)
        others = cka_EE[~np.eye(experts, dtype=bool)]
        cosine = (cosine_LEE[layer, :experts, :experts] / max(1, int(tokens_L[layer])))[~np.eye(experts, dtype=bool)]
        twins = float((apart_EE.max(1) > threshold).mean())
        kinds = float(np.trace(cka_EE) ** 2 / (cka_EE**2).sum())
        rows.append((layer, twins, others.mean(), others.max(), f"{first},{second}", cosine.mean(), cosine.max(), kinds))
    columns = ("layer", "redundant", "cka_mean", "cka_most", "nearest", "cosine_mean", "cosine_most", "kinds")
    return finding(
        columns,
        rows,
        f"redundant: share of experts with another at a CKA above {threshold}. CKA ignores rotations and scales of the output, cosine"
        " does not: only experts alike by both can take each other's place.",
    )


def cka(hsic_EE: np.ndarray) -> np.ndarray:
    """cka_EE; 0 for an expert whose output never varied, 1 with itself. The unbiased estimate can be a little below 0 or above 1."""
    own_E = np.sqrt(np.maximum(np.diag(hsic_EE), 0))
    scale_EE = np.outer(own_E, own_E)
    return np.where(scale_EE > 0, hsic_EE / np.where(scale_EE > 0, scale_EE, 1), np.eye(len(own_E)))
