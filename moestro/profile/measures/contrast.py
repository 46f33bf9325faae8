"""Contrast: task experts, or a language's, against generic text of a reference.

Paper      Bandarkar et al. 2025, arXiv 2510.04694
Idea       Experts chosen more on a task than on generic text in the same language carry the task.
Rule       Delta[l, e] = mean over task sequences of a / L - mean over generic sequences of a / L, a the tokens whose slots hold e, L the
           sequence's tokens; task experts: Delta > tau
Needs      sequences
Gives      experts of all layers, largest Delta first, with the bootstrap interval over sequences and whether Delta > tau
Departs    nothing; tau is tuned per model in the paper, about 0.2 to 0.3
Checked    sums to 0 over a layer; planted domain experts come first and their interval is above 0
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.measures.count_difference import maps
from moestro.profile.measures.npmi import ranked
from moestro.profile.profile import Profile


@method("profile.measures.contrast", kind="measure", paper="2510.04694", fidelity="faithful", needs=("sequences",))
def contrast(
    profile: Profile, *, label: str = "", against: str = "", tau: float = 0.2, most: int = 10, draws: int = 500, seed: int = 0
) -> Finding:
    """label: the task or language. against: the generic text. most: rows. draws: of the bootstrap."""
    if not label or not against or label == against:
        raise InputError("two labels are needed", expected="label=NAME,against=NAME of " + ", ".join(profile.labels))
    map_SLE, of_S = maps(profile)
    one, other = map_SLE[of_S == profile.label(label)], map_SLE[of_S == profile.label(against)]
    if not len(one) or not len(other):
        raise InputError(f"no sequences of {label!r} or of {against!r}", expected="at least one of each")
    delta_LE = one.mean(0) - other.mean(0)
    top = ranked(delta_LE, profile, most)
    at = tuple(np.array(top).T)
    low, high = _interval(one[:, at[0], at[1]], other[:, at[0], at[1]], draws, seed)
    rows = [(la, e, delta_LE[la, e], low[i], high[i], int(delta_LE[la, e] > tau)) for i, (la, e) in enumerate(top)]
    total = int((delta_LE > tau).sum())
    return finding(
        ("layer", "expert", "delta", "low", "high", "chosen"),
        rows,
        f"{total} experts have a delta above tau = {tau:g} ({len(one)} sequences of {label}, {len(other)} of {against}).",
    )


def _interval(one_SN: np.ndarray, other_SN: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Basic bootstrap of the difference of means, each side drawn on its own."""
    rng = np.random.default_rng(seed)
    found = one_SN.mean(0) - other_SN.mean(0)
    drawn = np.stack([_mean(rng, one_SN) - _mean(rng, other_SN) for _ in range(draws)])
    return 2 * found - np.quantile(drawn, 0.975, axis=0), 2 * found - np.quantile(drawn, 0.025, axis=0)


def _mean(rng: np.random.Generator, rows_SN: np.ndarray) -> np.ndarray:
    return rows_SN[rng.integers(len(rows_SN), size=len(rows_SN))].mean(0)
