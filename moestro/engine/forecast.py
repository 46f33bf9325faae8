"""What a plan should reach: a band of tokens per second from bytes and measured rates.

A decoded token costs compute (the trunk's and its experts' weights, each read from memory once) and reads (missed experts).
The upper end overlaps the two perfectly and has the better hit rate; the lower end does one after the other with the worse one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moestro.core.layer import ModelFacts
from moestro.core.plans.residency import Forecast
from moestro.core.trace import Trace
from moestro.engine.replay import CacheReport, replay
from moestro.engine.widths import Widths

REPEATED = 0.6  # share of experts that the next token uses again in the friendlier of the two assumed routings
# Of models with more layers only so many are simulated, with slots in proportion. The hit rate differs by some 2 points, and by
# more only where shared slots hold about one token's experts: there LRU drops to 0, which rounding the slots hides.
LAYERS_SIMULATED = 8
# Of each trunk, at its best and at its worst (small matrices, a busy machine): the share of the memory rate of all cores at which
# matrix-vector products read weights, and the seconds between them per layer. Measured on 2 cores.
EASE = {"native": ((0.9, 0.15e-3), (0.5, 0.8e-3)), "transformers": ((0.37, 0.3e-3), (0.18, 1e-3))}


def assumed_hit_rate(
    facts: ModelFacts,
    scope: str,
    slots: Sequence[int],
    eviction: str,
    options: Mapping[str, Any] | None = None,
    *,
    repeated: float,
    seed: int = 0,
    widths: Widths | None = None,
) -> float:
    """Decode hit rate of a warm cache when each expert of a token stays for the next with probability `repeated`, else a uniform
    other one takes its place; `repeated` = 0 draws every token anew, uniformly. With scope 'width' it is the share of the bytes."""
    layers = facts.layers[:LAYERS_SIMULATED]
    rng = np.random.default_rng(seed)
    warm = min(256, max(math.ceil(5 * la.num_experts / la.top_k) for la in layers))
    tokens, k = warm + 64, max(la.top_k for la in layers)
    experts_LTK = np.full((len(layers), tokens, k), -1, np.int16)
    for row_TK, layer in zip(experts_LTK, layers, strict=True):
        n, now = layer.num_experts, rng.permutation(layer.num_experts)[: layer.top_k]
        for t in range(tokens):
            kept = now[rng.random(len(now)) < repeated]
            fresh = rng.permutation(n)
            others = fresh[~np.isin(fresh, kept)]
            now = np.concatenate([kept, others])[: layer.top_k]
            row_TK[t, : layer.top_k] = now
    steps = np.arange(tokens, dtype=np.int32)
    sizes = tuple(la.num_experts for la in layers)
    trace = Trace(
        steps,
        np.zeros_like(steps),
        steps,
        steps,
        (steps < warm).astype(np.uint8),
        experts_LTK,
        experts_LTK.astype(np.float16),
        sizes,
        "",
    )
    if scope == "width":
        assert widths is not None
        few = widths.first(len(layers))
        shares = zip(slots, few.least_W([la.top_k for la in layers]), few.experts_W, widths.experts_W, strict=True)
        split = tuple(max(1, low, min(some, round(n * some / every))) for n, low, some, every in shares)
        found = replay(trace, split, scope, eviction, eviction_options=options, widths=few)
        bytes_LE = [np.asarray(row) for row in few.bytes_LE]
        asked = sum(int(row_E[ids[ids >= 0]].sum()) for row_E, ids in zip(bytes_LE, experts_LTK[:, warm:], strict=True))
        return 1 - found.missed_bytes[True] / asked
    if scope == "layer":
        split = tuple(slots[: len(layers)])
    else:
        split = (min(sum(sizes), max(k, round(slots[0] * len(layers) / len(facts.layers)))),)
    return replay(trace, split, scope, eviction, eviction_options=options).decode.hit_rate


def forecast(
    facts: ModelFacts,
    hits: tuple[float, float],
    *,
    trunk_bytes: int,
    disk_rate: float,
    memory_rate: float,
    expert_bytes: int,
    trunk: str = "transformers",
    hit_rate: float | None = None,
    missed_bytes_per_token: float | None = None,
) -> Forecast:
    """The band.

    Args:
        hits: worse and better hit rate.
        trunk_bytes: in memory. expert_bytes: read for one token if every expert misses.
        disk_rate, memory_rate: bytes/s. trunk: 'native' or 'transformers'.
        hit_rate, missed_bytes_per_token: what is expected, if a replay says; by default the middle of `hits`.
    """
    low, high = min(hits), max(hits)
    expected = (low + high) / 2 if hit_rate is None else hit_rate
    slow = compute_seconds(facts, trunk_bytes, memory_rate, trunk, best=False) + (1 - low) * expert_bytes / disk_rate
    fast = max(compute_seconds(facts, trunk_bytes, memory_rate, trunk), (1 - high) * expert_bytes / disk_rate)
    missed = (1 - expected) * expert_bytes if missed_bytes_per_token is None else missed_bytes_per_token
    return Forecast(1 / slow, 1 / fast, expected, missed, disk_rate, memory_rate)


def compute_seconds(facts: ModelFacts, trunk_bytes: int, memory_rate: float, trunk: str, *, best: bool = True) -> float:
    """Seconds of arithmetic per decoded token: bound by reading every weight it uses once."""
    share, overhead = EASE[trunk][0 if best else 1]
    return (trunk_bytes + facts.active_expert_bytes) / (share * memory_rate) + overhead * facts.decoder_layers


def seconds_per_token(report: CacheReport, compute: float, disk_rate: float) -> float:
    """Decode time as far as prefetching matters: misses wait, prefetched reads hide behind compute as far as it goes."""
    missed = report.missed_bytes_per_token()
    ahead = report.read_bytes_per_token() - missed
    return missed / disk_rate + max(compute, ahead / disk_rate)
