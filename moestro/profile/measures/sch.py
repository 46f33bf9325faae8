"""SCH: the hit rate of a cache that knows the next m tokens, segment cache best hit rate.

Paper      Liang et al. 2025, arXiv 2505.16056
Idea       What a cache of a given size could reach with foresight bounds what any policy reaches without.
Rule       A cache of c = ratio * k experts per layer; a token's missing experts are loaded, and those with the fewest uses among the next
           m tokens leave, ties by least recent use. The n-th distinct expert of a sequence counts as a hit while n <= c
Needs      a trace
Gives      per layer, and for all, SCH with its interval, beside LRU and Belady under the same rules, and SCH in random order
Departs    nothing; the cache is empty at the start of each sequence, and only the first `tokens` tokens of the trace are replayed
Checked    1 at c = E; never falls with c; never above Belady; constant routing gives 1
"""

from __future__ import annotations

import math

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.trace import Trace
from moestro.profile.finding import Finding, finding
from moestro.profile.intervals import bootstrap
from moestro.profile.profile import Profile


@method("profile.measures.sch", kind="measure", paper="2505.16056", fidelity="faithful", needs=("trace",))
def sch(
    profile: Profile, *, window: int = 16, ratio: float = 2.0, tokens: int = 8192, draws: int = 1000, seed: int = 0
) -> Finding:
    """window: m. ratio: cache size over experts active per token. tokens: replayed at most."""
    trace = profile.need_trace()
    if window < 1 or ratio < 1:
        raise InputError(f"a window of {window} and a ratio of {ratio}", expected="1 or more each")
    pieces = sequences_of(trace, tokens)
    found = {name: hits(trace, pieces, ratio, name, window) for name in ("segment", "lru", "belady")}
    rows_T = np.concatenate(pieces)
    mixed = np.random.default_rng(seed).permutation(rows_T)
    cuts = np.cumsum([len(p) for p in pieces])[:-1]
    null_SL, asked_SL = hits(trace, np.split(mixed, cuts), ratio, "segment", window)
    rows = []
    layers = [*((layer, slice(layer, layer + 1)) for layer in range(trace.layers)), ("all", slice(None))]
    for name, which in layers:
        hit_S, asked_S = (a[:, which].sum(1) for a in found["segment"])
        low, high = bootstrap(lambda t_S, h=hit_S, a=asked_S: (t_S @ h) / (t_S @ a), len(pieces), draws=draws, seed=seed)
        others = [found[p][0][:, which].sum() / found[p][1][:, which].sum() for p in ("lru", "belady")]
        null = null_SL[:, which].sum() / asked_SL[:, which].sum()
        rows.append((name, hit_S.sum() / asked_S.sum(), low, high, *others, null))
    return finding(
        ("layer", "sch", "low", "high", "lru", "belady", "shuffled"),
        rows,
        f"share of demands found in a cache of {ratio} times the active experts per layer; the policy sees {window} tokens ahead.",
        "belady knows everything and bounds all; lru knows nothing of what comes.",
    )


def sequences_of(trace: Trace, tokens: int) -> list[np.ndarray]:
    """Rows of each sequence, of the first `tokens` tokens."""
    sequence_T = np.asarray(trace.sequences_T)[:tokens]
    return [np.flatnonzero(sequence_T == s) for s in dict.fromkeys(sequence_T.tolist())]


def hits(trace: Trace, pieces: list[np.ndarray], ratio: float, policy: str, window: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(hits_SL, demands_SL) of caches of ratio * k experts per layer. policy: 'segment', 'lru' or 'belady'."""
    width = max(trace.num_experts)
    asked = [_demands(trace, rows, width) for rows in pieces]
    top_k_L = np.max([a.sum(2).max(0) for a in asked], axis=0)
    slots_L = np.minimum(np.maximum(1, [math.ceil(ratio * k - 1e-9) for k in top_k_L]), trace.num_experts)
    hit_SL = np.zeros((len(pieces), trace.layers), np.int64)
    for row, want_TLE in enumerate(asked):
        hit_SL[row] = _replay(want_TLE, slots_L, policy, window)
    return hit_SL, np.stack([a.sum((0, 2)) for a in asked]).astype(np.int64)


def _demands(trace: Trace, rows: np.ndarray, width: int) -> np.ndarray:
    """bool want_TLE."""
    ids_LTK = np.asarray(trace.experts_LTK[:, rows], np.int64)
    out = np.zeros((len(rows), trace.layers, width + 1), bool)
    np.put_along_axis(out, ids_LTK.transpose(1, 0, 2), True, axis=2)
    return out[:, :, :width]


def _replay(want_TLE: np.ndarray, slots_L: np.ndarray, policy: str, window: int) -> np.ndarray:
    tokens, layers, experts = want_TLE.shape
    if policy == "segment":
        used_TLE = np.concatenate([np.zeros((1, layers, experts), np.int32), np.cumsum(want_TLE, axis=0, dtype=np.int32)])
    elif policy == "belady":
        next_TLE = np.full((tokens + 1, layers, experts), tokens, np.int32)
        for t in range(tokens - 1, -1, -1):
            next_TLE[t] = np.where(want_TLE[t], t, next_TLE[t + 1])
    here_LE = np.zeros((layers, experts), bool)
    known_LE = here_LE.copy()
    last_LE = np.full((layers, experts), -1, np.int64)
    hit_L = np.zeros(layers, np.int64)
    for t, want_LE in enumerate(want_TLE):
        fresh_LE = want_LE & ~known_LE
        free_L = np.maximum(0, slots_L - known_LE.sum(1))
        hit_L += (want_LE & here_LE).sum(1) + np.minimum(fresh_LE.sum(1), free_L)
        known_LE |= want_LE
        last_LE[want_LE] = t
        here_LE |= want_LE
        if policy == "segment":
            worth_LE = (used_TLE[min(t + 1 + window, tokens)] - used_TLE[t + 1]).astype(np.int64) * (tokens + 2) + last_LE
        elif policy == "belady":
            worth_LE = (tokens - next_TLE[t + 1]).astype(np.int64) * (tokens + 2) + last_LE
        else:
            worth_LE = last_LE
        # Those in the cache by falling worth, ties by expert; the first slots_L of them stay.
        order_LE = np.argsort(np.where(here_LE, -worth_LE, np.iinfo(np.int64).max), axis=1, kind="stable")
        place_LE = np.argsort(order_LE, axis=1, kind="stable")
        here_LE &= place_LE < slots_L[:, None]
    return hit_L
