"""Domain specialisation: whether experts belong to kinds of text.

Paper      Muennighoff et al. 2024, arXiv 2409.02060 (OLMoE)
Idea       A domain's tokens going to some experts far more often than the even share says that the experts divide the domains.
Rule       share[g, l, e] = tokens of domain g whose slots hold e / tokens of g; strongest = mean over domains of max_e share, even is
           k / E; information = I(domain; expert of a slot) / H(domain). Null: the labels of whole sequences shuffled
Needs      usage and sequences
Gives      per layer strongest share, information, and its mean and 95th percentile under the null
Departs    the paper shows the shares; their summary in one number and the null are ours
Checked    planted domains with experts of their own: information 1; shuffled labels: within the null
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.measures.affinity import entropy
from moestro.profile.profile import Profile


@method(
    "profile.measures.domain_specialisation", kind="measure", paper="2409.02060", fidelity="adapted", needs=("usage", "sequences")
)
def domain_specialisation(profile: Profile, *, draws: int = 200, seed: int = 0) -> Finding:
    """One row per layer. draws: shuffles of the null."""
    if len(profile.labels) < 2:
        raise InputError(
            "the profile has one label", expected="two or more", fix="profile labelled text, see moestro profile --label"
        )
    counts_SLE = profile.need("sequences", "sequence_counts_SLE")
    of_S = profile.need("sequences", "sequence_label_S") - 1
    read = of_S >= 0
    counts_SLE, of_S, labels = counts_SLE[read].astype(np.float64), of_S[read], len(profile.labels)
    usage_GLE = profile.need("usage", "usage_GLE")
    tokens_G = np.maximum(1, np.array(profile.tokens_G))
    rng = np.random.default_rng(seed)
    null = np.array([_by_layer(counts_SLE, rng.permutation(of_S), labels) for _ in range(draws)])
    rows = []
    for layer, (experts, top_k) in enumerate(zip(profile.experts_L.tolist(), profile.top_k_L.tolist())):
        strongest = float((usage_GLE[:, layer] / tokens_G[:, None]).max(1).mean())
        found = information(usage_GLE[:, layer])
        rows.append((layer, strongest, top_k / experts, found, null[:, layer].mean(), np.quantile(null[:, layer], 0.95)))
    return finding(
        ("layer", "strongest", "even", "information", "null", "null_95"),
        rows,
        "information: 0 when the experts say nothing of the domain, 1 when they tell it; above null_95 it is more than chance.",
        "With few sequences per label the null is high: whole sequences are shuffled, as their tokens are not independent.",
    )


def information(usage_GE: np.ndarray) -> float:
    """I(domain; expert) / H(domain) of a table of counts; 0 for a single domain."""
    total = float(usage_GE.sum())
    if total == 0:
        return float("nan")
    p_GE = usage_GE / total
    p_G, p_E = p_GE.sum(1), p_GE.sum(0)
    inside = p_GE > 0
    mutual = float((p_GE[inside] * np.log(p_GE[inside] / np.outer(p_G, p_E)[inside])).sum())
    return mutual / entropy(p_G) if entropy(p_G) > 0 else 0.0


def _by_layer(counts_SLE: np.ndarray, of_S: np.ndarray, labels: int) -> list[float]:
    member_GS = (of_S[None, :] == np.arange(labels)[:, None]).astype(np.float64)
    usage_GLE = np.tensordot(member_GS, counts_SLE, 1)
    return [information(usage_GLE[:, layer]) for layer in range(counts_SLE.shape[1])]
