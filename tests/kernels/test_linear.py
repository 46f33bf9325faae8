"""Linear maps: against float64, bit for bit against themselves in other company, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels.convert import to_bf16
from moestro.kernels.ffn import FORMATS, Matrix
from moestro.kernels.linear import linear, linears
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4, encode_uint4

COMMON = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
WHOLE = ("f32", "f16", "bf16")


def matrix(rng: np.random.Generator, rows: int, cols: int, format: str, group: int = 32) -> Matrix:
    w = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
    if format in WHOLE:
        return Matrix(w if format == "f32" else w.astype(np.float16) if format == "f16" else to_bf16(w), format)
    if format == "mxfp4":
        return encode_mxfp4(w)
    return {"int8": encode_int8, "int4": encode_int4, "uint4": encode_uint4}[format](w, group)


@given(data=st.data())
@COMMON
def test_agrees_with_float64(level, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weights = []
    group = draw(st.sampled_from((32, 64, 128)))
    cols = draw(st.integers(1, 300)) if (whole := draw(st.booleans())) else group * draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 3))):
        format = draw(st.sampled_from(WHOLE if whole else FORMATS))
        weights.append(matrix(rng, draw(st.integers(1, 70)), cols, format, group))
    tokens, gap = draw(st.integers(0, 9)), draw(st.integers(0, 5))
    x = rng.standard_normal((tokens, cols + gap)).astype(np.float32)[:, :cols]
    biases = [rng.standard_normal(w.rows).astype(np.float32) if draw(st.booleans()) else None for w in weights]
    outs = [np.full((tokens, w.rows + gap), np.nan, np.float32) for w in weights]
    views = [out[:, : w.rows] for out, w in zip(outs, weights)]
    found = linears(x, weights, outs=views, biases=biases, threads=draw(st.integers(0, 3)))
    for out, whole_out, w, bias in zip(found, outs, weights, biases):
        expected = x.astype(np.float64) @ w.dequantise().astype(np.float64).T + (0 if bias is None else bias)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        assert np.isnan(whole_out[:, w.rows :]).all(), "only the rows' own places are written"
        assert (linear(x, w, bias_R=bias) == out).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_rows_bits_do_not_depend_on_its_company(level, format):
    rng = np.random.default_rng(1)
    cols, most = (612, 130) if format in WHOLE else (640, 130)
    if level == "numpy":
        cols, most = cols // 2, 20
    weight, other = matrix(rng, 77, cols, format), matrix(rng, 300, cols, format)
    x = rng.standard_normal((most, cols)).astype(np.float32)
    bias = rng.standard_normal(77).astype(np.float32)
    alone = np.concatenate([linear(x[t : t + 1], weight, bias_R=bias, threads=1) for t in range(most)])
    for count in (1, 2, 3, 4, 7, 16, most):
        for threads in (1, 2, 5):
            assert (linear(x[:count], weight, bias_R=bias, threads=threads) == alone[:count]).all()
            assert (linears(x[:count], [other, weight], biases=[None, bias], threads=threads)[1] == alone[:count]).all()


def test_a_large_matrix_in_one_call(level):
    """Enough work to be shared between threads."""
    rng = np.random.default_rng(2)
    weight = Matrix(rng.standard_normal((3000, 512)).astype(np.float32), "f32")
    x = rng.standard_normal((2, 512)).astype(np.float32)
    found = linear(x, weight)
    np.testing.assert_allclose(found, x @ weight.data.T, rtol=1e-3, atol=1e-3)
    for threads in (1, 2, 5):
        assert (linear(x[1:], weight, threads=threads) == found[1:]).all()


def test_linears_of_nothing(level):
    x = np.zeros((1, 4), np.float32)
    assert linears(x, []) == []
    assert linear(x, Matrix(np.empty((0, 4), np.float32), "f32")).shape == (1, 0)
    assert (linear(np.empty((2, 0), np.float32), Matrix(np.empty((3, 0), np.float32), "f32")) == np.zeros((2, 3))).all()


def test_refusals(level):
    weight = Matrix(np.zeros((6, 4), np.float32), "f32")
    x = np.zeros((2, 4), np.float32)
    for bad in (x[:, :3], x.astype(np.float64), np.zeros((2, 8), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="expected float32"):
            linear(bad, weight)
    with pytest.raises(ValueError, match="out"):
        linear(x, weight, out_TR=np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="bias"):
        linear(x, weight, bias_R=np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        linears(x, [weight], outs=[])
    frozen = np.zeros((2, 6), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        linear(x, weight, out_TR=frozen)
