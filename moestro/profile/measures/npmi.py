"""nPMI: experts that go with a marker token or a kind of text, by normalised pointwise mutual information.

Paper      Wang et al. 2025, arXiv 2505.14681 (RICE)
Idea       An expert that is on at every `<think>` and hardly elsewhere belongs to thinking.
Rule       With k_n of the M marked tokens and K_n of all T tokens holding expert n: nPMI = [log(k_n / M) + log(T / K_n)] / log(T / k_n);
           -1 if k_n = 0. With `minus` the score of a second marker is taken away
Needs      usage for labels; tokens for marker token ids
Gives      experts of all layers, best first
Departs    also for labels, where the marked tokens are all of a label's; markers are summed with weights +1 and -1 only
Checked    1 for an expert that is on at all markers and nowhere else; 0 under independence; planted domain experts come first
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError, ProfileError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile


@method("profile.measures.npmi", kind="measure", paper="2505.14681", fidelity="adapted", needs=("counts", "usage", "tokens"))
def npmi(profile: Profile, *, label: str = "", token: int = -1, minus: int = -1, most: int = 10) -> Finding:
    """label or token: what is marked. minus: a token whose experts are unwanted. most: rows."""
    if bool(label) == (token >= 0):
        raise InputError(
            "nothing, or a label and a token, is marked", expected="label=NAME or token=ID", fix="--measure npmi:token=ID"
        )
    counts_LE = profile.need("counts", "counts_LE")
    marked_LE, marked = _of_label(profile, label) if label else _of_token(profile, token)
    score_LE = normalised(marked_LE, counts_LE, marked, profile.tokens)
    if minus >= 0:
        other_LE, other = _of_token(profile, minus)
        score_LE = score_LE - normalised(other_LE, counts_LE, other, profile.tokens)
    rows = [
        (la, e, score_LE[la, e], marked_LE[la, e] / max(1, marked), counts_LE[la, e] / max(1, profile.tokens))
        for la, e in ranked(score_LE, profile, most)
    ]
    return finding(
        ("layer", "expert", "npmi", "share_there", "share_of_all"),
        rows,
        f"{marked} of {profile.tokens} tokens are marked. 1: only there and always; 0: chance; -1: never there.",
        "A marker that stands at one position finds experts of that position: compare with another token of the same place.",
    )


def normalised(marked_LE: np.ndarray, counts_LE: np.ndarray, marked: int, tokens: int) -> np.ndarray:
    """nPMI of each expert, between -1 and 1."""
    k, n = marked_LE.astype(np.float64), counts_LE.astype(np.float64)
    safe_k, safe_n = np.where(k > 0, k, 1), np.where(n > 0, n, 1)
    joint = np.log(tokens / safe_k)
    value = (np.log(safe_k / max(1, marked)) + np.log(tokens / safe_n)) / np.where(joint > 0, joint, 1)
    return np.where(k > 0, np.where(joint > 0, value, 0.0), -1.0)


def ranked(score_LE: np.ndarray, profile: Profile, most: int) -> list[tuple[int, int]]:
    """The `most` (layer, expert) of largest score; those beyond a narrow layer's experts take no part."""
    real_LE = np.arange(score_LE.shape[1])[None, :] < profile.experts_L[:, None]
    flat = np.where(real_LE, score_LE, -np.inf).reshape(-1)
    order = np.argsort(-flat, kind="stable")[: min(most, int(real_LE.sum()))]
    return [(int(i) // score_LE.shape[1], int(i) % score_LE.shape[1]) for i in order]


def _of_label(profile: Profile, label: str) -> tuple[np.ndarray, int]:
    g = profile.label(label)
    return profile.need("usage", "usage_GLE")[g], profile.tokens_G[g]


def _of_token(profile: Profile, token: int) -> tuple[np.ndarray, int]:
    found = np.flatnonzero(profile.need("tokens", "token_ids_I") == token)
    if not len(found):
        raise ProfileError(
            f"the profile holds nothing of the token {token}",
            expected="one of the data's most frequent ids, or one that was asked for",
            fix=f"moestro profile MODEL DATA --probe tokens:ids={token}",
        )
    return profile.need("tokens", "by_token_ILE")[found[0]], int(profile.need("tokens", "token_counts_I")[found[0]])
