"""Inter-layer affinity: how far a token's expert tells its expert in the next MoE layer.

Paper      Yao et al. 2024, arXiv 2401.08383 (ExFlow)
Idea       If the next expert is nearly certain, the two can stand on one device, or the second be fetched early.
Rule       P(j | i) from the heaviest experts of neighbouring layers; affinity = sum_i p_i max_j P(j | i); chance = max_j p_j, what one
           would get right without knowing i; information = I(i; j) / min(H(i), H(j))
Needs      transitions
Gives      per pair of neighbouring layers affinity, chance, information, and the surest frequent pair
Departs    with several slots the heaviest expert stands for the token
Checked    1 and information 1 for a permutation router; affinity near chance and information near 0 for independent layers
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.affinity", kind="measure", paper="2401.08383", fidelity="adapted", needs=("transitions",))
def affinity(profile: Profile) -> Finding:
    """One row per pair of neighbouring MoE layers."""
    next_LEE = profile.need("transitions", "next_first_LEE")
    if not len(next_LEE):
        raise InputError("the model has one MoE layer", expected="two, to measure from one to the next")
    rows = []
    for layer, counts_EE in enumerate(next_LEE):
        value, chance, information = predictability(counts_EE)
        first, second = surest(counts_EE)
        rows.append((f"{layer}-{layer + 1}", value, chance, information, f"{first} -> {second}"))
    return finding(
        ("layers", "affinity", "chance", "information", "surest"),
        rows,
        "affinity: share of tokens whose next expert is the likeliest one after their present expert; compare with chance.",
        "With fewer tokens than about 10 x E^2 information is too high: independent layers give about (E - 1)^2 / (2 x tokens) nats.",
    )


def predictability(counts_EE: np.ndarray) -> tuple[float, float, float]:
    """(affinity, chance, normalised mutual information) of a table of pairs."""
    total = float(counts_EE.sum())
    if total == 0:
        return float("nan"), float("nan"), float("nan")
    p_EE = counts_EE / total
    first_E, second_E = p_EE.sum(1), p_EE.sum(0)
    inside = p_EE > 0
    mutual = float((p_EE[inside] * np.log(p_EE[inside] / np.outer(first_E, second_E)[inside])).sum())
    least = min(entropy(first_E), entropy(second_E))
    return float(p_EE.max(1).sum()), float(second_E.max()), mutual / least if least > 0 else 0.0


def entropy(p_E: np.ndarray) -> float:
    """In nats."""
    kept = p_E[p_E > 0]
    return float(-(kept * np.log(kept)).sum())


def surest(counts_EE: np.ndarray) -> tuple[int, int]:
    """The pair with the largest P(j | i) among experts i with at least their even share of the tokens."""
    sums_E = counts_EE.sum(1)
    often_E = sums_E * np.count_nonzero(sums_E) >= sums_E.sum()
    chance_EE = np.where(often_E[:, None], counts_EE / np.maximum(1, sums_E)[:, None], -1)
    first, second = np.unravel_index(int(chance_EE.argmax()), chance_EE.shape)
    return int(first), int(second)
