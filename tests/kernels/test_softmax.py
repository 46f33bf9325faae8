"""Softmax and sigmoid against float64."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.kernels.softmax import sigmoid, softmax


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 60), (5, 257)])
def test_agree_with_float64(level, shape):
    rng = np.random.default_rng(0)
    scores = (rng.standard_normal((shape[0], shape[1] + 2)) * 20).astype(np.float32)[:, : shape[1]]
    exact = scores.astype(np.float64)
    e = np.exp(exact - exact.max(1, keepdims=True, initial=-np.inf))
    np.testing.assert_allclose(softmax(scores), e / e.sum(1, keepdims=True), rtol=3e-6, atol=1e-12)
    np.testing.assert_allclose(sigmoid(scores), 1 / (1 + np.exp(-exact)), rtol=3e-6, atol=1e-12)


def test_extremes(level):
    scores = np.array([[1e30, 0.0, -1e30], [-1e30, -1e30, -np.inf]], np.float32)
    assert (softmax(scores) == np.array([[1, 0, 0], [0.5, 0.5, 0]], np.float32)).all()
    assert (sigmoid(scores) == np.array([[1, 0.5, 0], [0, 0, 0]], np.float32)).all()


def test_refusals(level):
    for function in (softmax, sigmoid):
        with pytest.raises(ValueError, match="expected float32"):
            function(np.zeros((2, 3)))
