"""Planted traces whose right answers are known. Shapes: L layers, T tokens, K slots, E experts."""

from __future__ import annotations

import numpy as np

from moestro.core.trace import Trace


def trace_of(experts_LTK: np.ndarray, num_experts: int, *, prefill: int = 0, passes: int = 1, **more) -> Trace:
    """A trace of one sequence: `prefill` tokens read in `passes` passes, the rest decoded one by one."""
    experts_LTK = np.asarray(experts_LTK, np.int16)
    layers, tokens, _ = experts_LTK.shape
    position = np.arange(tokens, dtype=np.int32)
    steps = np.where(position < prefill, position * passes // max(1, prefill), position - prefill + passes * (prefill > 0))
    return Trace(
        position,
        np.zeros(tokens, np.int32),
        position,
        steps.astype(np.int32),
        (position < prefill).astype(np.uint8),
        experts_LTK,
        np.ones(experts_LTK.shape, np.float16),
        (num_experts,) * layers,
        "planted",
        **more,
    )


def sticky(layers=4, tokens=200, slots=2, experts=12, repeat=0.6, seed=0, **more) -> Trace:
    """Each expert of a layer stays for the next token with probability `repeat`, else a uniform other one takes its place."""
    rng = np.random.default_rng(seed)
    out = np.empty((layers, tokens, slots), np.int16)
    for layer in range(layers):
        now = rng.choice(experts, slots, replace=False)
        for t in range(tokens):
            kept = now[rng.random(slots) < repeat]
            rest = np.setdiff1d(np.arange(experts), kept)
            now = np.concatenate([kept, rng.choice(rest, slots - len(kept), replace=False)])
            out[layer, t] = now
    return trace_of(out, experts, **more)


def zipf(layers=3, tokens=400, slots=2, experts=16, power=1.2, seed=0, **more) -> Trace:
    """Independent tokens, popular experts: expert e of a layer has weight (1 + rank of e) ** -power."""
    rng = np.random.default_rng(seed)
    p = (1.0 + np.arange(experts)) ** -power
    out = np.empty((layers, tokens, slots), np.int16)
    for layer in range(layers):
        order = rng.permutation(experts)
        score = rng.gumbel(size=(tokens, experts)) + np.log(p)
        out[layer] = order[np.argsort(-score, axis=1)[:, :slots]]
    return trace_of(out, experts, **more)


def cyclic(layers=1, tokens=60, experts=6) -> Trace:
    """Token t uses expert t mod E: the worst case of LRU."""
    out = np.tile(np.arange(tokens) % experts, (layers, 1))[:, :, None]
    return trace_of(out, experts)


def periodic(layers=2, tokens=80, slots=2, experts=8, period=4, seed=0) -> Trace:
    """The same `period` tokens over and over."""
    rng = np.random.default_rng(seed)
    one = np.stack([[rng.choice(experts, slots, replace=False) for _ in range(period)] for _ in range(layers)])
    return trace_of(np.tile(one, (1, tokens // period, 1)), experts)


def topics(layers=2, tokens=300, slots=2, experts=12, change=150, seed=0) -> Trace:
    """Before `change` only the first half of the experts is used, afterwards only the second."""
    rng = np.random.default_rng(seed)
    half = experts // 2
    out = np.stack(
        [[rng.choice(half, slots, replace=False) + half * (t >= change) for t in range(tokens)] for _ in range(layers)]
    )
    return trace_of(out, experts)
