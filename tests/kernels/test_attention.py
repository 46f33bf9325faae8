"""Attention against a plain softmax in float64, and bit for bit against itself in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.attention import attend
from moestro.kernels.convert import to_bf16, to_f32

COMMON = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
CACHES = ("float32", "float16", "bf16")


def cache(rng: np.random.Generator, length: int, shared: int, width: int, kind: str, by_head: bool = False) -> np.ndarray:
    """[S, K, d], laid out so in memory or, `by_head`, [K, S, d]."""
    values = rng.standard_normal((shared, length, width) if by_head else (length, shared, width)).astype(np.float32)
    values = to_bf16(values) if kind == "bf16" else values.astype(kind)
    return values.transpose(1, 0, 2) if by_head else values


def truth(q, keys, values, lengths, scale, window=0, sinks=None, softcap=0.0):
    """float64 [T, H, v], head by head."""
    q, keys, values = q.astype(np.float64), to_f32(keys).astype(np.float64), to_f32(values).astype(np.float64)
    tokens, heads, _ = q.shape
    out = np.zeros((tokens, heads, values.shape[2]))
    for t in range(tokens):
        for h in range(heads):
            i = h * keys.shape[1] // heads
            seen = slice(max(0, lengths[t] - window) if window else 0, lengths[t])
            if lengths[t] == 0:
                continue
            scores = keys[seen, i] @ q[t, h] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - scores.max()))
            out[t, h] = weights @ values[seen, i] / total
    return out


@given(data=st.data())
@COMMON
def test_agrees_with_float64(level, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shared, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width, wide = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    length = draw(st.integers(1, 90))
    kind, other = draw(st.sampled_from(CACHES)), draw(st.sampled_from(CACHES))
    keys = cache(rng, length, shared, width, kind, draw(st.booleans()))
    values = cache(rng, length, shared, wide, other, draw(st.booleans()))
    lengths = np.array(draw(st.lists(st.integers(0, length), max_size=6)), draw(st.sampled_from((np.int64, np.int32))))
    q = rng.standard_normal((len(lengths), shared * group, width)).astype(np.float32)
    options = {
        "scale": draw(st.sampled_from((0.1, 1.0))),
        "window": draw(st.sampled_from((0, 1, 7, 64))),
        "softcap": draw(st.sampled_from((0.0, 5.0))),
    }
    sinks = rng.standard_normal(shared * group).astype(np.float32) * 3 if draw(st.booleans()) else None
    out = attend(q, keys, values, lengths_T=lengths, sinks_H=sinks, threads=draw(st.integers(0, 3)), **options)
    expected = truth(q, keys, values, lengths, sinks=sinks, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("shared", "group", "width", "wide"), [(4, 1, 64, 64), (2, 8, 40, 33), (1, 130, 36, 32)])
def test_a_prompt_in_pieces_gives_the_same_bits(level, shared, group, width, wide, by_head):
    """Token by token, at once, in chunks, with any threads; long enough for several spans."""
    rng = np.random.default_rng(3)
    length = 1200 if level in ("avx2", "avx512", "neon") else 560
    keys, values = cache(rng, length, shared, width, "bf16", by_head), cache(rng, length, shared, wide, "float16", by_head)
    tokens = 70
    q = rng.standard_normal((tokens, shared * group, width)).astype(np.float32)
    lengths = np.arange(length - tokens, length) + 1
    for window in (0, 100):
        whole = attend(q, keys, values, lengths_T=lengths, scale=0.2, window=window)
        chosen = slice(None, None, 23)
        expected = truth(q[chosen], keys, values, lengths[chosen], 0.2, window)
        np.testing.assert_allclose(whole[chosen], expected, rtol=1e-4, atol=1e-4)
        for t in range(0, tokens, 9):
            for threads in (1, 2, 5):
                one = attend(q[t : t + 1], keys, values, lengths_T=lengths[t : t + 1], scale=0.2, window=window, threads=threads)
                assert (one == whole[t : t + 1]).all()
        part = attend(q[11:29], keys, values, lengths_T=lengths[11:29], scale=0.2, window=window, threads=3)
        assert (part == whole[11:29]).all()


def test_what_lies_beyond_the_lengths_is_never_used(level):
    rng = np.random.default_rng(4)
    keys, values = cache(rng, 40, 2, 16, "float32"), cache(rng, 40, 2, 16, "float32")
    q = rng.standard_normal((9, 4, 16)).astype(np.float32)
    lengths = np.arange(12, 21)
    expected = attend(q, keys, values, lengths_T=lengths, scale=0.3, window=8)
    for place in (slice(20, 40), slice(0, 4)):
        keys[place], values[place] = np.nan, np.nan
    assert (attend(q, keys, values, lengths_T=lengths, scale=0.3, window=8) == expected).all()
    values[19] = np.nan
    found = attend(q, keys, values, lengths_T=lengths, scale=0.3, window=8)
    assert (found[:8] == expected[:8]).all() and np.isnan(found[8]).all(), "a bad value reaches only the queries that see it"


def test_scores_of_any_size(level):
    """Neither very large nor very small scores overflow, and a far larger one takes all the weight."""
    keys = np.array([[[1.0]], [[-1.0]], [[3.0]]], np.float32)
    values = np.array([[[1.0]], [[2.0]], [[4.0]]], np.float32)
    for size, expected in ((1e4, 4.0), (-1e4, 2.0)):
        q = np.full((1, 1, 1), size, np.float32)
        out = attend(q, keys, values, lengths_T=np.array([3]), scale=1.0)
        np.testing.assert_allclose(out, [[[expected]]], rtol=1e-6)
    out = attend(
        np.zeros((1, 1, 1), np.float32), keys, values, lengths_T=np.array([3]), scale=1.0, sinks_H=np.array([200.0], np.float32)
    )
    np.testing.assert_allclose(out, 0, atol=1e-6)


def test_refusals(level):
    q, keys, lengths = np.zeros((2, 4, 8), np.float32), np.zeros((5, 2, 8), np.float32), np.array([1, 2])
    options = {"scale": 1.0, "lengths_T": lengths}
    for bad in (np.zeros((5, 3, 8), np.float32), np.zeros((5, 2, 7), np.float32), np.zeros((5, 0, 8), np.float32)):
        with pytest.raises(ValueError, match="do not fit"):
            attend(q, bad, bad, **options)
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, keys, keys[:4], **options)
    with pytest.raises(ValueError, match="values"):
        attend(q, keys, keys.astype(np.float64), **options)
    with pytest.raises(ValueError, match="cache holds 5"):
        attend(q, keys, keys, scale=1.0, lengths_T=np.array([1, 6]))
    with pytest.raises(ValueError, match="lengths"):
        attend(q, keys, keys, scale=1.0, lengths_T=np.array([1]))
    with pytest.raises(ValueError, match="sinks"):
        attend(q, keys, keys, sinks_H=np.zeros(3, np.float32), **options)
    with pytest.raises(ValueError, match="out"):
        attend(q, keys, keys, out_THv=np.zeros((2, 4, 7), np.float32), **options)
    with pytest.raises(ValueError, match="negative"):
        attend(q, keys, keys, window=-1, **options)
