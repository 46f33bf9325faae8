"""Combine, top-k, sorting, conversion, quantisation, levels and the bandwidth probe against their numpy references."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moestro.kernels import native
from moestro.kernels.bandwidth import probe
from moestro.kernels.checksum import crc32
from moestro.kernels.combine import combine, reference_combine
from moestro.kernels.convert import reference_to_bf16, reference_to_f32, split_gate_up, to_bf16, to_f32, transpose
from moestro.kernels.ffn import MXFP4_VALUES, Matrix
from moestro.kernels.packed import FORMATS, Packed, pack, quantise, reference_quantise
from moestro.kernels.permute import reference_sort_pairs, sort_pairs
from moestro.kernels.put import put, reference_put
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4, encode_uint4
from moestro.kernels.topk import reference_topk, topk

COMMON = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROUTES = st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(0, 99))


@given(route=ROUTES)
@COMMON
def test_sort_and_combine(level, route):
    tokens, slots, seed = route
    rng = np.random.default_rng(seed)
    experts = rng.integers(-1, 7, (tokens, slots))
    weights = rng.standard_normal((tokens, slots)).astype(np.float32)
    found, expected = sort_pairs(experts, weights, 7), reference_sort_pairs(experts, weights, 7)
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)
    assert (experts[found.token_N, found.slot_N] == found.expert_N).all() and (np.diff(found.expert_N) >= 0).all()
    rows = rng.standard_normal((len(found.token_N), 19)).astype(np.float32)
    y, z = np.full((tokens, 19), np.nan, np.float32), np.empty((tokens, 19), np.float32)
    combine(rows, found.token_N, found.slot_N, found.weight_N, y)
    reference_combine(rows, found.token_N, found.slot_N, found.weight_N, z)
    assert (y == z).all()
    order = rng.permutation(len(rows))
    combine(rows[order], found.token_N[order], found.slot_N[order], found.weight_N[order], z)
    assert (y == z).all(), "the order of the pairs must not show"
    for t in range(tokens):
        mine = found.token_N == t
        np.testing.assert_allclose(y[t], (found.weight_N[mine, None] * rows[mine]).sum(0), atol=1e-5)


@given(count=st.one_of(st.integers(0, 300), st.integers(4000, 5000)), start=st.integers(0, 17), seed=st.integers(0, 99))
@COMMON
def test_a_checksum_is_that_of_zlib_at_any_length_and_alignment(level, count, start, seed):
    all_N = np.random.default_rng(seed).integers(0, 256, start + 2 * count, np.uint8)
    some_N, more_N = all_N[start : start + count], all_N[start + count :]
    assert crc32(some_N) == zlib.crc32(some_N)
    assert crc32(more_N, crc32(some_N)) == zlib.crc32(all_N[start:])
    module = native.extension()
    if module is not None and module.has_crc32():  # below the size that is worth the call too
        assert module.crc32(some_N.ctypes.data, count, 7) == zlib.crc32(some_N, 7)


def test_sort_refuses_an_expert_that_is_not_there(level):
    with pytest.raises(ValueError, match="expert 4"):
        sort_pairs(np.array([[4]]), np.ones((1, 1), np.float32), 4)


def test_combine_refuses_pairs_that_do_not_fit(level):
    rows, ids, ones = np.ones((2, 3), np.float32), np.array([0, 1]), np.ones(2, np.float32)
    for token, slot, y in ((ids + 1, ids, (2, 3)), (ids - 1, ids, (2, 3)), (ids, ids - 1, (2, 3)), (ids[:1], ids, (2, 3)), (ids, ids, (2, 4))):  # fmt: skip
        with pytest.raises(ValueError):
            combine(rows, token, slot, ones, np.zeros(y, np.float32))


@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 4)),
    dtype=st.sampled_from([np.float32, np.float16, np.uint16]),
    seed=st.integers(0, 99),
)
@COMMON
def test_put(level, sizes, dtype, seed):
    (tokens, heads, width, at), rng = sizes, np.random.default_rng(seed)
    rows = rng.choice(np.float32([0, -0.0, 1 / 3, 1e-7, 6e-8, 65519, 7e4, -np.inf, np.nan, 1.00390625]), (heads, tokens, width))
    rows = rows.transpose(1, 0, 2)
    room, expected = (np.zeros((heads, at + tokens + 2, width), dtype) for _ in range(2))
    put(room, rows, at)
    reference_put(expected, rows, at)
    np.testing.assert_array_equal(room.view(np.uint8), expected.view(np.uint8))
    for wrong in (-1, at + 3):
        with pytest.raises(ValueError):
            put(room, rows, wrong)
    with pytest.raises(ValueError):
        put(room[:, :, :-1], rows, at)


@given(
    scores=hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 40)), elements=st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 0.5, np.inf, -np.inf, np.nan, 3.0])),
    share=st.floats(0, 1),
)  # fmt: skip
@COMMON
def test_topk(level, scores, share):
    k = round(share * scores.shape[1])
    ids, values = topk(scores, k)
    expected_ids, expected_values = reference_topk(scores, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(values, expected_values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_topk_refuses(level):
    with pytest.raises(ValueError, match="5 best of 4"):
        topk(np.zeros((1, 4), np.float32), 5)


@pytest.mark.parametrize("dtype", [np.uint16, np.float16])
def test_every_sixteen_bit_pattern(level, dtype):
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    found, expected = to_f32(values), reference_to_f32(values, np.empty(values.shape, np.float32))
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all() and (found[~nan].view(np.uint32) == expected[~nan].view(np.uint32)).all()
    if dtype == np.uint16:
        assert (to_bf16(found)[~nan] == values[~nan]).all(), "bf16 survives the round trip"


def test_to_bf16_rounds_as_torch_does(level):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    found = to_bf16(values)
    assert (found == reference_to_bf16(values, np.empty(values.shape, np.uint16))).all()
    import torch

    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    real = ~np.isnan(values)
    assert (found[real] == expected[real]).all() and np.isnan(to_f32(found[~real])).all()


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 150)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float16, np.float32, np.float64]),
)
@COMMON
def test_layouts(level, shape, dtype):
    rows, half = shape
    raw = np.arange(rows * half * 2).reshape(rows, 2 * half).astype(dtype)
    assert (transpose(raw) == raw.T).all()
    assert (transpose(raw[:, 1:]) == raw[:, 1:].T).all()
    for transposed in (False, True):
        for interleaved in (False, True):
            fused = raw if transposed else np.ascontiguousarray(raw.T)
            gate, up = split_gate_up(fused, transposed=transposed, interleaved=interleaved)
            outputs = raw.T
            expected = (outputs[0::2], outputs[1::2]) if interleaved else (outputs[:half], outputs[half:])
            assert (gate == expected[0]).all() and (up == expected[1]).all()
            assert rows == 1 or gate.strides[1] == up.strides[1] == raw.itemsize


@given(
    seed=st.integers(0, 99),
    rows=st.integers(1, 35),
    groups=st.integers(1, 11),
    group=st.sampled_from((32, 64, 128)),
    scale=st.sampled_from((1e-30, 1e-3, 1.0, 1e3)),
    kind=st.sampled_from(("f32", "f16", "bf16")),
)
@COMMON
def test_tiles_hold_the_references_bytes(level, seed, rows, groups, group, scale, kind):
    """From any float format at any stride and alignment; many values are equal in size, zero of either sign, or all of a group."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((rows, groups * group)) * scale).astype(np.float32)
    w[rng.random(w.shape) < 0.1] = 0
    w[:1, :group] = 0
    w[-1:] = np.sign(w[-1:]) * np.float32(scale)  # ties, and negative zeros
    stored = {"f32": w, "f16": w.astype(np.float16), "bf16": to_bf16(w)}[kind]
    room = np.zeros(rows * (stored.shape[1] + 3) * stored.itemsize + 1, np.uint8)
    odd = np.ndarray(stored.shape, stored.dtype, room.data, 1, ((stored.shape[1] + 3) * stored.itemsize, stored.itemsize))
    odd[...] = stored
    w = to_f32(stored)
    for format in FORMATS:
        per = 32 if format == "mxfp4" else group
        found = quantise(odd, format, per)
        if format in ("int3", "int2", "nested"):
            expected = Packed(tuple(np.zeros_like(p) for p in found.parts), format, per, *w.shape)
            assert reference_quantise(w, expected)
        elif format in ("int8", "int4"):
            expected = pack((encode_int8 if format == "int8" else encode_int4)(w, per, scale_dtype="float16"))
        else:
            expected = pack(encode_mxfp4(w) if format == "mxfp4" else encode_uint4(w, per))
        for ours, theirs in zip(found.parts, expected.parts, strict=True):
            assert (ours == theirs).all(), format
        again = quantise(found.dequantise(), "mxfp4", 32) if format == "mxfp4" else found
        assert (again.dequantise() == found.dequantise()).all()


@pytest.mark.parametrize(
    ("encode", "bound"), [(encode_int8, 1 / 254), (encode_int4, 1 / 8), (encode_mxfp4, 1 / 4), (encode_uint4, 1 / 14)]
)
def test_quantisation_error_is_bounded(level, encode, bound):
    """Half a step of the largest weight; int4 clips at one step on the side opposite to its largest, MXFP4 saturates at 6 of 8; the
    steps of uint4 are a fifteenth of the range, which is at most twice the largest, and its ends are rounded to float16."""
    w = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    m = encode(w)
    largest = np.abs(w.reshape(64, -1, m.group)).max(-1, keepdims=True)
    assert (np.abs(m.dequantise() - w).reshape(64, -1, m.group) <= bound * largest * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match="not-a-number"):
        encode(np.full((1, 128), np.nan, np.float32))
    with pytest.raises(ValueError, match="divides the row"):
        encode(np.zeros((1, 33), np.float32))


def test_uint4_finds_the_numbers_it_stored(level):
    """Weights that are four bits with a scale and a minimum, as a Q4_1 file holds them, come back as they were."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (24, 128)).astype(np.uint8)
    codes.reshape(24, -1, 32)[..., :2] = (0, 15)
    pairs = rng.uniform(0.5, 1, (24, 4, 2)).astype(np.float16)
    pairs[..., 1] *= rng.choice([-8, 1], (24, 4))
    stored = Matrix(codes[:, ::2] | codes[:, 1::2] << 4, "uint4", pairs, 32)
    found = encode_uint4(stored.dequantise(), 32)
    assert found.scales is not None
    assert (found.data == stored.data).all() and (found.scales == pairs).all()
    wanted = codes.astype(np.float32) * np.repeat(pairs[..., 0], 32, 1) + np.repeat(pairs[..., 1], 32, 1)
    assert (stored.dequantise() == wanted).all()
    with pytest.raises(ValueError, match="needs scales"):
        Matrix(stored.data, "uint4", pairs[..., 0], 32)


def test_float16_scales_that_overflow_are_refused(level):
    with pytest.raises(ValueError, match="too large for float16"):
        encode_int8(np.full((1, 64), 1e30, np.float32), scale_dtype="float16")
    with pytest.raises(ValueError, match="too large for float16"):
        encode_uint4(np.full((1, 64), 1e30, np.float32))


def test_mxfp4_agrees_with_the_table(level):
    codes = np.arange(16, dtype=np.uint8)
    w = np.tile(MXFP4_VALUES, 2)[None] * np.float32(2**-5)
    m = encode_mxfp4(w)
    assert m.scales is not None and int(m.scales[0, 0]) == 127 - 5
    assert (m.data[0] == np.tile(codes[0::2] | codes[1::2] << 4, 2)).all() and (m.dequantise() == w).all()


def test_bandwidth_probe(level):
    assert 1e8 < probe(0.02, nbytes=32 << 20) < 1e13


@pytest.mark.parametrize("wanted", ["numpy", *native.levels(), "", "sse9"])
def test_the_environment_chooses_the_level(wanted):
    code = "from moestro.kernels import native; print(native.level())"
    environment = os.environ | {"MOESTRO_KERNELS": wanted}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if wanted == "sse9":
        assert result.returncode and "MOESTRO_KERNELS=sse9 is not a level" in result.stderr
    else:
        assert result.stdout.strip() == (wanted or native.levels()[-1])


@pytest.mark.parametrize("absent", [name for name in native.LEVELS if name not in native.levels()])
def test_a_level_that_is_not_there_is_refused_by_name(absent, monkeypatch):
    assert set(native.levels()) <= set(native.LEVELS)
    monkeypatch.setenv("MOESTRO_KERNELS", absent)
    with pytest.raises(ValueError, match=f"MOESTRO_KERNELS={absent}, but "):
        native.extension.__wrapped__()


def test_kernels_work_after_a_fork(level):
    """A forked child has none of its parent's threads."""
    code = """
import os, numpy as np
from moestro.kernels.convert import to_f32
a = np.ones(1 << 20, np.uint16)
to_f32(a)
pid = os.fork()
if pid == 0:
    to_f32(a)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "7", result.stderr
