"""SRP: how well a window's experts can be told in advance by one yes or no each, segment routing best performance.

Paper      Liang et al. 2025, arXiv 2505.16056
Idea       If the tokens of a stretch of text use the same experts, a small cache serves it.
Rule       Cases are all windows of m consecutive tokens within a sequence x experts, with count f. With A = sum f, M(a) = sum of f >= a,
           P(a) = m #{f >= a}: SRP = max over a of 2 M(a) / (P(a) + A); rho = P(a*) / A at the best a
Needs      a trace
Gives      per layer, and for the model with one threshold, SRP, its interval, rho, and SRP of the same tokens in random order
Departs    nothing
Checked    1 for m = 1 and for constant routing; equal to brute force over all choices; never below 2 a / (1 + a), a = k / E
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.trace import Trace
from moestro.profile.finding import Finding, finding
from moestro.profile.intervals import bootstrap
from moestro.profile.profile import Profile


@method("profile.measures.srp", kind="measure", paper="2505.16056", fidelity="exact", needs=("trace",))
def srp(profile: Profile, *, window: int = 16, draws: int = 1000, seed: int = 0) -> Finding:
    """window: m. draws: of the bootstrap over sequences."""
    trace = profile.need_trace()
    counts_LSM = windows(trace, window)
    shuffled = np.random.default_rng(seed).permutation(trace.tokens)
    null_LM = windows(trace, window, shuffled).sum(1)
    rows = []
    for name, counts_SM, null_M in [
        *((layer, counts_LSM[layer], null_LM[layer]) for layer in range(trace.layers)),
        ("all", counts_LSM.sum(0), null_LM.sum(0)),
    ]:
        value, rho = best(counts_SM.sum(0))
        low, high = bootstrap(lambda times_S, c=counts_SM: best(times_S @ c)[0], len(counts_SM), draws=draws, seed=seed)
        rows.append((name, value, low, high, rho, best(null_M)[0]))
    return finding(
        ("layer", "srp", "low", "high", "rho", "shuffled"),
        rows,
        f"srp: 1 when every window of {window} tokens uses the same experts throughout; what counts is its distance from shuffled.",
        "rho: experts kept for a window over experts active per token, at the best threshold.",
    )


def windows(trace: Trace, window: int, order_T: np.ndarray | None = None) -> np.ndarray:
    """cases_LSM: how many (window, expert) pairs of each sequence have count f = 0..window. order_T: tokens are taken in this order.

    Raises InputError when no sequence is as long as the window.
    """
    if window < 1:
        raise InputError(f"the window is {window}", expected="1 or more")
    _, sequence_T = np.unique(trace.sequences_T, return_inverse=True)
    sequences = int(sequence_T.max()) + 1
    first = np.arange(max(0, trace.tokens - window + 1))
    first = first[sequence_T[first] == sequence_T[first + window - 1]]
    if not len(first):
        raise InputError(f"no sequence of the trace has {window} tokens", fix="choose a smaller window, or profile longer texts")
    out = np.zeros((trace.layers, sequences, window + 1), np.int64)
    for layer, experts in enumerate(trace.num_experts):
        ids_TK = np.asarray(trace.experts_LTK[layer], np.int64)
        ids_TK = ids_TK if order_T is None else ids_TK[order_T]
        used_TE = np.zeros((trace.tokens + 1, experts + 1), np.int32)
        np.put_along_axis(used_TE[1:], ids_TK, 1, axis=1)
        before_TE = np.cumsum(used_TE[:, :experts], axis=0, dtype=np.int32)
        count_WE = before_TE[first + window] - before_TE[first]
        place = sequence_T[first][:, None] * (window + 1) + count_WE
        out[layer] = np.bincount(place.reshape(-1), minlength=sequences * (window + 1)).reshape(sequences, window + 1)
    return out


def best(cases_M: np.ndarray) -> tuple[float, float]:
    """(SRP, rho) of the numbers of cases with count 0..m."""
    most = len(cases_M) - 1
    counts = np.arange(most + 1)
    total = float((counts * cases_M).sum())
    if total == 0:
        return float("nan"), float("nan")
    hit_A = np.cumsum((counts * cases_M)[::-1])[::-1]
    asked_A = most * np.cumsum(cases_M[::-1])[::-1]
    score_A = 2 * hit_A / (asked_A + total)
    at = int(score_A.argmax())
    return float(score_A[at]), float(asked_A[at] / total)
