"""The experts' feed-forward: against the numpy reference in float64, and bit for bit against itself in other company."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moestro.kernels import native
from moestro.kernels.convert import to_bf16
from moestro.kernels.ffn import ACTIVATIONS, FORMATS, ExpertView, Matrix, activate, grouped_ffn
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4, encode_uint4

COMMON = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def matrix(rng: np.random.Generator, rows: int, cols: int, format: str, group: int = 32, scale_dtype: str = "float32") -> Matrix:
    w = (rng.standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)
    if format == "f32":
        return Matrix(w, format)
    if format == "f16":
        return Matrix(w.astype(np.float16), format)
    if format == "bf16":
        return Matrix(to_bf16(w), format)
    if format == "mxfp4":
        return encode_mxfp4(w)
    if format == "uint4":
        return encode_uint4(w, group)
    encode = encode_int8 if format == "int8" else encode_int4
    return encode(w, group, scale_dtype=scale_dtype)


def displaced(m: Matrix, shift: int, gap: int) -> Matrix:
    """The same matrix at an odd address with gaps between its rows."""

    def move(array: np.ndarray) -> np.ndarray:
        row = array[0].nbytes
        raw = np.zeros(shift + array.shape[0] * (row + gap), np.uint8)
        out = np.ndarray(array.shape, array.dtype, raw.data, shift, (row + gap, *array.strides[1:]))
        out[...] = array
        return out

    return Matrix(move(m.data), m.format, None if m.scales is None else move(m.scales), m.group)


def expert(
    rng: np.random.Generator, width: int, inner: int, format: str, *, gated: bool = True, bias: bool = False, **options
) -> ExpertView:
    biases = [rng.standard_normal(n).astype(np.float32) if bias else None for n in (inner, inner, width)]
    return ExpertView(
        matrix(rng, inner, width, format, **options) if gated else None,
        matrix(rng, inner, width, format, **options),
        matrix(rng, width, inner, format, **options),
        *(biases if gated else [None, *biases[1:]]),
    )


def truth(x_ND: np.ndarray, view: ExpertView, activation: str, limit: float, alpha: float) -> np.ndarray:
    """float64 [N, D]."""
    x_ND = x_ND.astype(np.float64)

    def product(x: np.ndarray, m: Matrix, bias: np.ndarray | None) -> np.ndarray:
        return x @ m.dequantise().astype(np.float64).T + (0 if bias is None else bias)

    gate = None if view.gate is None else product(x_ND, view.gate, view.gate_bias)
    up = product(x_ND, view.up, view.up_bias)
    return product(activate(gate, up, activation, limit, alpha), view.down, view.down_bias)


def run(x: np.ndarray, rows: np.ndarray, starts: list[int], experts: list[ExpertView], activation: str = "silu", **options):
    out = np.full((len(rows), x.shape[1]), np.nan, np.float32)
    grouped_ffn(x, rows, np.array(starts), experts, activation=activation, out_ND=out, **options)
    return out


@given(data=st.data())
@COMMON
def test_agrees_with_float64(level, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    format = draw(st.sampled_from(FORMATS))
    group = draw(st.sampled_from((32, 64, 128))) if format in ("int8", "int4", "uint4") else 32
    if format in ("f32", "f16", "bf16"):
        width, inner = draw(st.integers(1, 90)), draw(st.integers(1, 70))
    else:
        width, inner = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 2))
    activation = draw(st.sampled_from(ACTIVATIONS))
    gated = activation == "swiglu_clamped" or draw(st.booleans())
    scale_dtype = draw(st.sampled_from(("float32", "float16")))
    bias = draw(st.booleans())
    options = {"gated": gated, "bias": bias, "group": group, "scale_dtype": scale_dtype}
    experts = [expert(rng, width, inner, format, **options) for _ in range(draw(st.integers(1, 4)))]
    shift, gap = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    experts = [
        ExpertView(
            None if e.gate is None else displaced(e.gate, shift, gap), displaced(e.up, shift, gap), displaced(e.down, shift, gap),
            e.gate_bias, e.up_bias, e.down_bias,
        )
        for e in experts
    ]  # fmt: skip
    counts = [draw(st.integers(0, 9)) for _ in experts]
    x = rng.standard_normal((7, width)).astype(np.float32) * 2
    rows = rng.integers(0, 7, sum(counts))
    starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
    weight = rng.standard_normal(len(rows)).astype(np.float32) if draw(st.booleans()) else None
    arithmetic = {"limit": 1.5, "alpha": 1.7}
    out = run(x, rows, starts, experts, activation, threads=draw(st.integers(1, 3)), input_weight_N=weight, **arithmetic)
    for e, start, stop in zip(experts, starts, starts[1:]):
        picked = x[rows[start:stop]]
        if weight is not None:
            picked = picked * weight[start:stop, None]
        expected = truth(picked, e, activation, **arithmetic)
        np.testing.assert_allclose(out[start:stop], expected, rtol=2e-4, atol=2e-4 * (1 + np.abs(expected).max(initial=0)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_rows_bits_do_not_depend_on_its_company(level, format):
    """1, 2, 3, 5, 17, 128 or 300 rows, one or many threads, other experts beside it, any place in the batch."""
    rng = np.random.default_rng(5)
    # With BLOCK = 256 inputs the widths below need several blocks; 612 and 331 also leave tails.
    width, inner = (612, 331) if format in ("f32", "f16", "bf16") else (640, 352)
    if level == "numpy":
        width, inner = width // 2, inner // 2 // 32 * 32 if format not in ("f32", "f16", "bf16") else 165
    first, second = (expert(rng, width, inner, format, bias=True) for _ in range(2))
    most = 40 if level == "numpy" else 300
    x = rng.standard_normal((most, width)).astype(np.float32)
    alone = np.concatenate([run(x, np.array([n]), [0, 1], [first], threads=1) for n in range(most)])
    assert np.isfinite(alone).all()
    for count in (2, 3, 4, 5, 6, 7, 16, 17, 128, most):
        count = min(count, most)
        for threads in (1, 2, 5):
            assert (run(x, np.arange(count), [0, count], [first], threads=threads) == alone[:count]).all()
    order = rng.permutation(most)
    half = most // 3
    both = run(x, order, [0, half, half, most], [second, second, first], threads=2)
    assert (both[half:] == alone[order[half:]]).all()


def test_long_calls_go_in_waves_with_the_same_bits(level):
    """More rows than the memory between the two halves holds; that memory must not grow with the call."""
    if level == "numpy":
        pytest.skip("the reference has no such memory")
    rng = np.random.default_rng(1)
    view = expert(rng, 8, 2048, "bf16")
    x = rng.standard_normal((64, 8)).astype(np.float32)
    few = run(x, np.arange(64), [0, 64], [view])
    rows = np.tile(np.arange(64), 100)
    out = run(x, rows, [0, 10, 5000, 6400], [view, view, view])
    assert (out == few[rows]).all()
    module = native.extension()
    before = module.ffn_scratch_bytes()
    assert before < (16 << 20) * 2 + 4 * (1 << 20)
    run(x, np.tile(rows, 3), [0, 19200], [view])
    assert module.ffn_scratch_bytes() == before


def test_strided_inputs_outputs_and_interleaved_rows(level):
    rng = np.random.default_rng(2)
    fused = to_bf16(rng.standard_normal((2 * 24, 40)).astype(np.float32))
    down = matrix(rng, 40, 24, "bf16")
    views = ExpertView(Matrix(fused[0::2], "bf16"), Matrix(fused[1::2], "bf16"), down)
    plain = ExpertView(Matrix(fused[0::2].copy(), "bf16"), Matrix(fused[1::2].copy(), "bf16"), down)
    wide = rng.standard_normal((5, 64)).astype(np.float32)
    rows = np.array([4, 0, 2])
    expected = run(wide[:, 8:48].copy(), rows, [0, 3], [plain])
    place = np.zeros((3, 100), np.float32)
    grouped_ffn(wide[:, 8:48], rows, np.array([0, 3]), [views], activation="silu", out_ND=place[:, 10:50])
    assert (place[:, 10:50] == expected).all() and not place[:, :10].any() and not place[:, 50:].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_their_whole_range(level, activation):
    """Identity weights: what comes out is the activation itself, from tiny to huge inputs."""
    n = 64
    eye, ones = np.eye(n, dtype=np.float32), np.ones(n, np.float32)
    view = ExpertView(Matrix(eye, "f32"), Matrix(eye * 0, "f32"), Matrix(eye, "f32"), None, ones, None)
    x = np.concatenate([-np.geomspace(1e-6, 200, n // 2), np.geomspace(1e-6, 200, n // 2)]).astype(np.float32)[None]
    out = run(x, np.array([0]), [0, 1], [view], activation, limit=7.0, alpha=1.702)
    expected = activate(x.astype(np.float64), np.ones((1, n)), activation, 7.0, 1.702)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row(level):
    rng = np.random.default_rng(3)
    view = expert(rng, 64, 32, "f32")
    x = rng.standard_normal((6, 64)).astype(np.float32)
    clean = run(x, np.arange(6), [0, 6], [view])
    x[2, 5] = np.nan
    out = run(x, np.arange(6), [0, 6], [view])
    assert np.isnan(out[2]).all() and (np.delete(out, 2, 0) == np.delete(clean, 2, 0)).all()


def test_calls_from_several_python_threads(level):
    rng = np.random.default_rng(4)
    views = [expert(rng, 64, 96, "int8") for _ in range(4)]
    x = rng.standard_normal((4, 64)).astype(np.float32)
    expected = run(x, np.arange(4), [0, 1, 2, 3, 4], views)
    wrong = []

    def work() -> None:
        for _ in range(20):
            if not (run(x, np.arange(4), [0, 1, 2, 3, 4], views, threads=2) == expected).all():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_buffer_may_be_refilled_under_a_view(level):
    rng = np.random.default_rng(6)
    first, second = matrix(rng, 32, 32, "f32"), matrix(rng, 32, 32, "f32")
    view = ExpertView(first, first, first)
    x = rng.standard_normal((1, 32)).astype(np.float32)
    run(x, np.array([0]), [0, 1], [view])
    first.data[...] = second.data
    assert (run(x, np.array([0]), [0, 1], [view]) == run(x, np.array([0]), [0, 1], [ExpertView(second, second, second)])).all()


def test_refusals(level):
    rng = np.random.default_rng(7)
    x, view = np.zeros((1, 32), np.float32), expert(rng, 32, 32, "f32", gated=False)
    with pytest.raises(ValueError, match="unknown activation"):
        run(x, np.array([0]), [0, 1], [view], "swish")
    with pytest.raises(ValueError, match="needs a gate"):
        run(x, np.array([0]), [0, 1], [view], "swiglu_clamped", limit=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        ExpertView(matrix(rng, 32, 32, "f32"), matrix(rng, 16, 32, "f32"), matrix(rng, 32, 16, "f32"))
    with pytest.raises(ValueError, match="needs scales"):
        Matrix(np.zeros((2, 32), np.int8), "int8", np.zeros((2, 2), np.float32), 32)
    with pytest.raises(ValueError, match="not a bf16 matrix"):
        Matrix(np.zeros((2, 32), np.float32), "bf16")
    assert run(x, np.zeros(0, np.int64), [0, 0], [view]).shape == (0, 32)


def test_every_mxfp4_scale(level):
    """All 256 exponents times all 16 codes, read through an identity; 255 is not-a-number, tiny ones are subnormal."""
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    data = np.tile(codes[0::2] | codes[1::2] << 4, (256, 1))
    up = Matrix(data, "mxfp4", np.arange(256, dtype=np.uint8)[:, None])
    expected = up.dequantise()
    assert np.isnan(expected[255]).all() and np.isfinite(expected[:253]).all() and expected[0, 1] == 2.0**-128
    eye = Matrix(np.eye(32, 256, dtype=np.float32), "f32")
    for rows in (1, 5, 9):
        out = run(np.eye(32, dtype=np.float32)[:rows], np.arange(rows), [0, rows], [ExpertView(None, up, eye)], "relu")
        # The sum meets the not-a-number of row 255, which the identity multiplies by zero.
        assert np.isnan(out).all()
    real = Matrix(data[:253], "mxfp4", np.arange(253, dtype=np.uint8)[:, None])
    for first in range(0, 253, 32):
        pick = Matrix(np.eye(32, 253, first, dtype=np.float32), "f32")
        for rows in (3, 32):
            out = run(np.eye(32, dtype=np.float32)[:rows], np.arange(rows), [0, rows], [ExpertView(None, real, pick)], "relu")
            wanted = np.maximum(expected[first : min(first + 32, 253), :rows].T, 0)
            assert (out[:, : wanted.shape[1]] == wanted).all()
