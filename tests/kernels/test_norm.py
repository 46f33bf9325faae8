"""Normalisation of rows against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.norm import add_rms_norm, rms_norm

COMMON = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def truth(x: np.ndarray, weight: np.ndarray, eps: float, plus_one: bool) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (weight.astype(np.float64) + plus_one)


@given(
    tokens=st.integers(0, 5), width=st.integers(1, 200), heads=st.integers(0, 3), gap=st.integers(0, 3), plus_one=st.booleans()
)
@COMMON
def test_rms_norm(level, tokens, width, heads, gap, plus_one):
    rng = np.random.default_rng(width)
    shape = (tokens, heads, width + gap) if heads else (tokens, width + gap)
    x = (rng.standard_normal(shape) * 3).astype(np.float32)[..., :width]
    weight = rng.standard_normal(width).astype(np.float32)
    expected = truth(x, weight, 1e-5, plus_one)
    before = x.copy()
    out = rms_norm(x, weight, 1e-5, plus_one=plus_one)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert (x == before).all()
    for t in range(tokens):
        assert (rms_norm(x[t : t + 1], weight, 1e-5, plus_one=plus_one) == out[t : t + 1]).all()
    assert rms_norm(x, weight, 1e-5, out_TD=x, plus_one=plus_one) is x
    assert (x == out).all()


@given(tokens=st.integers(0, 5), width=st.integers(1, 200), scale=st.sampled_from((1.0, 0.22)))
@COMMON
def test_add_rms_norm(level, tokens, width, scale):
    rng = np.random.default_rng(width)
    x, y = (rng.standard_normal((tokens, width)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(width).astype(np.float32)
    total = x + np.float32(scale) * y
    out = add_rms_norm(x, y, weight, 1e-6, scale=scale)
    assert (x == total).all()
    assert (out == rms_norm(total, weight, 1e-6)).all()


def test_refusals(level):
    x, weight = np.zeros((2, 4), np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, np.zeros(3, np.float32), 1e-5)
    with pytest.raises(ValueError, match="expected float32"):
        rms_norm(x.astype(np.float16), weight, 1e-5)
    with pytest.raises(ValueError, match="out"):
        rms_norm(x, weight, 1e-5, out_TD=np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="add"):
        add_rms_norm(x, np.zeros((3, 4), np.float32), weight, 1e-5)
    with pytest.raises(ValueError, match="axes"):
        rms_norm(np.zeros(4, np.float32), weight, 1e-5)
