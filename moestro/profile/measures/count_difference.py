"""Count difference: experts used more in one class of texts than in the others.

Paper      Dahlke et al. 2025, arXiv 2502.11096 (Mixture of Tunable Experts)
Idea       Differencing activation maps of classes of behaviour finds the few experts that carry one of them.
Rule       a(q)[l, e] = tokens of text q whose slots hold e, divided by its tokens unless raw; A_c = mean of a over class c;
           difference = A_c - mean of the other classes' A. z = difference / standard deviation of it with shuffled classes
Needs      sequences
Gives      experts of all layers, largest difference first, with z
Departs    texts are sequences as they were cut; z is ours
Checked    sums to 0 over a layer's experts when not raw; planted domains' experts come first; shuffled classes give |z| of about 1
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.measures.npmi import ranked
from moestro.profile.profile import Profile


@method("profile.measures.count_difference", kind="measure", paper="2502.11096", fidelity="adapted", needs=("sequences",))
def count_difference(
    profile: Profile, *, label: str = "", raw: bool = False, most: int = 10, draws: int = 200, seed: int = 0
) -> Finding:
    """label: the class; needed. raw: tokens instead of shares of the text. most: rows. draws: shuffles."""
    if not label:
        raise InputError(
            "no class is named", expected="one of " + ", ".join(profile.labels), fix="--measure count_difference:label=NAME"
        )
    g = profile.label(label)
    map_SLE, of_S = maps(profile, raw)
    if len(np.unique(of_S)) < 2 or g not in of_S:
        raise InputError(f"no sequences of {label!r} and of other labels", expected="sequences of two labels or more")
    found_LE = difference(map_SLE, of_S, g)
    rng = np.random.default_rng(seed)
    null = np.stack([difference(map_SLE, rng.permutation(of_S), g) for _ in range(draws)])
    spread_LE = null.std(0)
    rows = [
        (la, e, found_LE[la, e], found_LE[la, e] / spread_LE[la, e] if spread_LE[la, e] > 0 else None)
        for la, e in ranked(found_LE, profile, most)
    ]
    return finding(
        ("layer", "expert", "difference", "z"),
        rows,
        f"{int((of_S == g).sum())} sequences of {label}, {int((of_S != g).sum())} of others.",
        f"the largest of {int(profile.experts_L.sum())} experts has a z of 3 to 4 by chance alone.",
    )


def maps(profile: Profile, raw: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(map_SLE, label_S) of the sequences read."""
    of_S = profile.need("sequences", "sequence_label_S") - 1
    read = of_S >= 0
    map_SLE = profile.need("sequences", "sequence_counts_SLE")[read].astype(np.float64)
    tokens_S = profile.need("sequences", "sequence_tokens_S")[read]
    return map_SLE if raw else map_SLE / tokens_S[:, None, None], of_S[read]


def difference(map_SLE: np.ndarray, of_S: np.ndarray, g: int) -> np.ndarray:
    """Mean map of class g less the mean of the other classes' mean maps."""
    others = [map_SLE[of_S == c].mean(0) for c in np.unique(of_S) if c != g]
    return map_SLE[of_S == g].mean(0) - np.mean(others, axis=0)
