"""Rotary embedding against complex multiplication in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.rope import rotate

COMMON = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tables(tokens: int, rotated: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    angle = np.outer(np.arange(first, first + tokens), 100.0 ** (-np.arange(rotated // 2) / max(rotated // 2, 1)))
    angle = np.concatenate([angle, angle], axis=1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@given(
    tokens=st.integers(0, 4), heads=st.integers(1, 4), half=st.integers(0, 40), rest=st.integers(0, 9), gap=st.integers(0, 3),
    interleaved=st.booleans(), last=st.booleans(),
)  # fmt: skip
@COMMON
def test_agrees_with_complex_numbers(level, tokens, heads, half, rest, gap, interleaved, last):
    rng = np.random.default_rng(half)
    width, start = 2 * half + rest, rest if last else 0
    x = rng.standard_normal((tokens, heads, width + gap)).astype(np.float32)
    before, view = x.copy(), x[..., :width]
    cos, sin = tables(tokens, 2 * half)
    rotate(view, cos, sin, interleaved=interleaved, start=start)
    pairs = [(start + 2 * i, start + 2 * i + 1) if interleaved else (start + i, start + half + i) for i in range(half)]
    expected = before.astype(np.float64)
    for i, (a, b) in enumerate(pairs):
        turned = (before[..., a] + 1j * before[..., b].astype(np.float64)) * (
            cos[:, None, i] + 1j * sin[:, None, i].astype(np.float64)
        )
        expected[..., a], expected[..., b] = turned.real, turned.imag
    np.testing.assert_allclose(x, expected, atol=1e-6)
    untouched = [i for i in range(width + gap) if i not in sum(pairs, ())]
    assert (x[..., untouched] == before[..., untouched]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(level, interleaved):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 16)).astype(np.float32)
    scores = []
    for shift in (0, 3, 11):
        a, b = q.copy(), k.copy()
        rotate(a, *tables(1, 16, shift + 5), interleaved=interleaved)
        rotate(b, *tables(1, 16, shift), interleaved=interleaved)
        scores.append((a * b).sum())
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)


def test_refusals(level):
    x = np.zeros((2, 3, 8), np.float32)
    cos, sin = tables(2, 8)
    with pytest.raises(ValueError, match="rotate"):
        rotate(x, cos, sin, start=1)
    with pytest.raises(ValueError, match="rotate"):
        rotate(x, np.ascontiguousarray(cos[:, :3]), np.ascontiguousarray(sin[:, :3]))
    with pytest.raises(ValueError, match="sin"):
        rotate(x, cos, sin[:1])
    with pytest.raises(ValueError, match="x is"):
        rotate(x.astype(np.float64), cos, sin)
