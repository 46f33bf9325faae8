"""Packed weights: layouts against their definitions, products against numpy bit for bit, and the error of int8 activations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moestro.kernels.ffn import ExpertView, Matrix, activate, grouped_ffn, reference_grouped_ffn
from moestro.kernels.linear import linear, linears
from moestro.kernels.packed import FORMATS, Packed, pack, part_sizes, quantise, reference_quantise, round_activations
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4, encode_uint4

CASES = [(format, group) for format in FORMATS for group in ((32,) if format == "mxfp4" else (32, 64, 128))]


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)


@pytest.mark.parametrize(("format", "group"), CASES)
def test_codes_mean_what_the_formats_say(level, format, group):
    rng = np.random.default_rng(1)
    w = weights(rng, 37, 3 * 128)
    packed = quantise(w, format, group)
    assert [p.nbytes for p in packed.parts] == list(part_sizes(37, 3 * 128, format, group))
    assert packed.nbytes == sum(p.nbytes for p in packed.parts) and packed.shape == (37, 384)
    error = np.sqrt(((packed.dequantise() - w) ** 2).mean() / (w**2).mean())
    bound = {"int8": 0.007, "int4": 0.11, "int3": 0.2, "int2": 0.36, "mxfp4": 0.12, "nested": 0.14, "uint4": 0.11}[format]
    assert error < bound
    if format in ("int8", "int4", "uint4", "mxfp4"):
        if format == "mxfp4":
            same = encode_mxfp4(w)
        elif format == "uint4":
            same = encode_uint4(w, group)
        else:
            same = (encode_int8 if format == "int8" else encode_int4)(w, group, scale_dtype="float16")
        assert (pack(same).dequantise() == same.dequantise()).all()
        assert (packed.dequantise() == same.dequantise()).all()


@pytest.mark.parametrize(("format", "group"), CASES)
def test_rows_taken_are_those_of_the_matrix(level, format, group):
    w = np.random.default_rng(0).standard_normal((37, 2 * group)).astype(np.float32)
    whole, ids = quantise(w, format, group), np.array([36, 0, 5, 5, 16])
    for planes in range(1, len(whole.parts) + 1):
        packed = replace(whole, parts=whole.parts[:planes])
        taken = packed.take(ids, np.empty((5, 2 * group), np.float32))
        np.testing.assert_array_equal(taken, packed.dequantise()[ids])
    with pytest.raises(IndexError, match="of 37"):
        whole.take(np.array([37]), np.empty((1, 2 * group), np.float32))


@pytest.mark.parametrize(("format", "group"), CASES)
def test_every_level_gives_numpys_bits(level, format, group):
    """Codes and products; 1 to 130 rows, any threads, with every number of planes."""
    rng = np.random.default_rng(2)
    w, x = weights(rng, 53, 3 * 128), rng.standard_normal((130, 3 * 128)).astype(np.float32)
    x[1] *= np.float32(1e-30)
    x[2, :64] = 0
    packed = quantise(w, format, group)
    wanted = Packed(tuple(np.zeros_like(p) for p in packed.parts), format, group, *packed.shape)
    if format in ("int3", "int2", "nested"):
        assert reference_quantise(w, wanted)
        assert all((a == b).all() for a, b in zip(packed.parts, wanted.parts))
    for parts in range(1, len(packed.parts) + 1):
        some = Packed(packed.parts[:parts], format, group, *packed.shape)
        product = some.reference()
        alone = np.stack([product(row) for row in x[:5]])
        found = linear(x, some)
        assert (found[:5] == alone).all()
        for count, threads in ((1, 1), (2, 2), (7, 3), (13, 1), (129, 2)):
            assert (linear(x[:count], some, threads=threads) == found[:count]).all()


@pytest.mark.parametrize("format", FORMATS)
def test_experts_from_tiles(level, format):
    """Rounding the activations costs about a percent; a row's bits do not depend on its company; relu agrees with numpy exactly."""
    rng = np.random.default_rng(3)
    width, inner, group = 256, 160, 32
    views = [
        ExpertView(*(quantise(weights(rng, *s), format, group) for s in ((inner, width), (inner, width), (width, inner))))
        for _ in range(3)
    ]
    bias = [rng.standard_normal(n).astype(np.float32) for n in (inner, inner, width)]
    views[1] = ExpertView(views[1].gate, views[1].up, views[1].down, *bias)
    x = rng.standard_normal((40, width)).astype(np.float32)
    rows = rng.integers(0, 40, 150)
    starts, weight = np.array([0, 1, 135, 150]), rng.standard_normal(150).astype(np.float32)
    for activation, scaled in (("silu", None), ("relu", weight)):
        out = np.full((150, width + 3), np.nan, np.float32)[:, :width]
        grouped_ffn(x, rows, starts, views, activation=activation, out_ND=out, input_weight_N=scaled, threads=2)
        picked = x[rows] if scaled is None else x[rows] * scaled[:, None]
        for g, view in enumerate(views):
            for n in range(starts[g], min(starts[g + 1], starts[g] + 4)):
                one = np.empty((1, width), np.float32)
                grouped_ffn(
                    picked[n : n + 1],
                    np.zeros(1, np.int64),
                    np.array([0, 1]),
                    [view],
                    activation=activation,
                    out_ND=one,
                    threads=1,
                )
                assert (one[0] == out[n]).all()
        if activation == "relu":
            short = starts.clip(max=6)
            wanted = np.empty((6, width), np.float32)
            reference_grouped_ffn(x, rows[:6], short, views, activation="relu", out_ND=wanted, input_weight_N=weight[:6])
            assert (wanted == out[:6]).all()
        exact = np.concatenate([truth(picked[a:b], view, activation) for view, a, b in zip(views, starts, starts[1:])])
        error = np.sqrt(((out - exact) ** 2).mean() / (exact**2).mean())
        assert 1e-4 < error < 0.015


def truth(x_ND: np.ndarray, view: ExpertView, activation: str) -> np.ndarray:
    """The expert in float64 from the values of its codes."""

    def product(x: np.ndarray, m, bias: np.ndarray | None) -> np.ndarray:
        return x @ m.dequantise().astype(np.float64).T + (0 if bias is None else bias)

    x_ND = x_ND.astype(np.float64)
    hidden = activate(product(x_ND, view.gate, view.gate_bias), product(x_ND, view.up, view.up_bias), activation, 0, 1)
    return product(hidden, view.down, view.down_bias)


def test_what_is_not_finite_is_seen(level):
    rng = np.random.default_rng(4)
    packed = quantise(weights(rng, 20, 64), "int4", 32)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    x[1, 3], x[2, 60], x[3] = np.inf, np.nan, np.float32(1e-45)
    out = linear(x, packed)
    assert np.isfinite(out[0]).all() and np.isnan(out[1:3]).all() and (out[3] == 0).all()
    codes, scales = round_activations(x)
    assert (codes[1, 0] == 0).all() and np.isnan(scales[1, 0]) and scales[3, 0] == 0


def test_mxfp4_keeps_the_ends_of_its_scales(level):
    """Exponents 0 (subnormal) and 255 (not-a-number) of a matrix that was not made here."""
    data, scales = np.full((16, 16), 0x21, np.uint8), np.arange(16, dtype=np.uint8)[:, None] % 3
    scales[5] = 255
    matrix = Matrix(data, "mxfp4", scales)
    packed = pack(matrix)
    np.testing.assert_array_equal(packed.dequantise(), matrix.dequantise())
    out = linear(np.full((1, 32), 2.0**100, np.float32), packed)
    assert np.isnan(out[0, 5])
    expected = matrix.dequantise().astype(np.float64).sum(1) * 2.0**100
    np.testing.assert_allclose(np.delete(out[0], 5), np.delete(expected, 5), rtol=1e-6)


def test_a_minimum_that_is_no_number_is_seen(level):
    packed = quantise(weights(np.random.default_rng(6), 20, 64), "uint4", 32)
    assert packed.finite
    packed.parts[0][32:64].view(np.float16)[3] = np.inf
    assert not packed.finite


def test_refusals(level):
    rng = np.random.default_rng(5)
    w = weights(rng, 8, 64)
    with pytest.raises(ValueError, match="unknown packed format"):
        quantise(w, "int5", 32)
    with pytest.raises(ValueError, match="divides the row"):
        quantise(w, "int4", 128)
    with pytest.raises(ValueError, match="too large for float16"):
        quantise(w * np.float32(1e20), "int2", 32)
    with pytest.raises(ValueError, match="infinities"):
        quantise(w * np.float32(np.inf), "int3", 32)
    with pytest.raises(ValueError, match="do not fit float16"):
        pack(encode_int4(w * np.float32(1.2345), 32))
    with pytest.raises(ValueError, match="as it is"):
        pack(Matrix(w, "f32"))
    packed = quantise(w, "int8", 32)
    with pytest.raises(ValueError, match="has parts of"):
        Packed((packed.parts[0][:-1],), "int8", 32, 8, 64)
    with pytest.raises(ValueError, match="contiguous"):
        Packed((np.repeat(packed.parts[0], 2)[::2],), "int8", 32, 8, 64)
    rows = encode_int8(w, 32)
    with pytest.raises(ValueError, match="not both"):
        ExpertView(None, packed, Matrix(np.zeros((64, 8), np.float32), "f32"))
    if level != "numpy":
        with pytest.raises(ValueError, match="cannot share a call"):
            linears(np.zeros((1, 64), np.float32), [packed, rows])
