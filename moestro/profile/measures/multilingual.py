"""Multilingual divergence: how far each language's routing is from a reference language's, layer by layer.

Paper      Bandarkar et al. 2025, arXiv 2510.04694
Idea       Languages route apart in early and late layers and alike in the middle, where the work is shared.
Rule       q_g = shares of combine weight per expert on text of label g; divergence = JS(q_g, q_ref) / normaliser, the normaliser log 2 or,
           with entropy, the mean of H(q_g) and H(q_ref)
Needs      usage; best on parallel text
Gives      per layer the divergence of each label from the reference
Departs    the paper averages over parallel sentences; here each language's weight is pooled. Its entropy normalisation is inferred
Checked    0 for equal routing, 1 (log 2) for disjoint experts, symmetric
"""

from __future__ import annotations

import math

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.measures.affinity import entropy
from moestro.profile.profile import Profile


@method("profile.measures.multilingual", kind="measure", paper="2510.04694", fidelity="adapted", needs=("usage",))
def multilingual(profile: Profile, *, reference: str = "en", normalise: str = "log2") -> Finding:
    """reference: the label compared with. normalise: log2 or entropy."""
    if normalise not in ("log2", "entropy"):
        raise InputError(f"normalise is {normalise!r}", expected="log2 or entropy")
    base = profile.label(reference)
    mass_GLE = np.abs(profile.need("usage", "usage_mass_GLE"))
    others = [g for g in range(len(profile.labels)) if g != base]
    if not others:
        raise InputError(
            "the profile has one label", expected="two or more", fix="profile labelled text, see moestro profile --label"
        )
    rows = []
    for layer in range(len(profile.layers)):
        rows.append((layer, *(divergence(mass_GLE[g, layer], mass_GLE[base, layer], normalise) for g in others)))
    return finding(
        ("layer", *(profile.labels[g] for g in others)),
        rows,
        f"Jensen-Shannon divergence from {reference}, normalised by {normalise}; 0: the same experts, 1: none in common (log2).",
        "On little text even one language's halves differ: compare with two labels of the same language.",
    )


def divergence(a_E: np.ndarray, b_E: np.ndarray, normalise: str = "log2") -> float:
    """Normalised Jensen-Shannon divergence of two loads; not a number when one is empty."""
    if a_E.sum() <= 0 or b_E.sum() <= 0:
        return float("nan")
    p_E, q_E = a_E / a_E.sum(), b_E / b_E.sum()
    distance = entropy((p_E + q_E) / 2) - (entropy(p_E) + entropy(q_E)) / 2
    scale = math.log(2) if normalise == "log2" else (entropy(p_E) + entropy(q_E)) / 2
    return max(0.0, distance) / scale if scale > 0 else 0.0 if distance <= 0 else float("inf")
