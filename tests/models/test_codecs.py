"""Codecs: every stored layout gives the same expert, MXFP4 agrees with transformers, and records bring back what was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import CheckpointError, InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.kernels.convert import reference_to_bf16, to_bf16, to_f32
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.models.codecs import (
    CODECS,
    Codec,
    Record,
    decode,
    encode,
    encode_matrix,
    keeps_weights,
    load,
    parse_codec,
    stored_format,
    view,
    weights_of,
)
from moestro.models.codecs.encode import parse_trunk_codec
from moestro.models.layout import Part
from moestro.models.writer import CheckpointWriter

D, F = 64, 32
CODES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def made(seed: int = 0, d: int = D, f: int = F, gated: bool = True, bias: bool = True) -> ExpertWeights:
    """An expert whose values are exact in F16 and BF16."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(-127, 128, shape).astype(np.float32) / 64

    weights = draw(f, d) if gated else None, draw(f, d), draw(d, f)
    return ExpertWeights(*weights, *((draw(f) if gated else None, draw(f), draw(d)) if bias else ()))


def same(a: ExpertWeights, b: ExpertWeights) -> None:
    for name in ExpertWeights.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype == np.float32
            np.testing.assert_array_equal(x, y, err_msg=name)


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    return to_bf16(np.ascontiguousarray(array)) if dtype == "BF16" else array.astype(CODES[dtype])


def layouts(w: ExpertWeights, fused: bool, transposed: bool, interleaved: bool) -> dict[str, np.ndarray]:
    """The arrays by role that a checkpoint of this layout holds for one expert."""
    out = {"down": w.down_DF, "down_bias": w.down_D}
    if fused:
        for role, gate, up in (("gate_up", w.gate_FD, w.up_FD), ("gate_up_bias", w.gate_F, w.up_F)):
            if up is None:
                continue
            both = np.concatenate([gate, up])
            if interleaved:
                both = np.stack([gate, up], 1).reshape(both.shape)
            out[role] = both
    else:
        out |= {"gate": w.gate_FD, "up": w.up_FD, "gate_bias": w.gate_F, "up_bias": w.up_F}
    out = {role: array for role, array in out.items() if array is not None}
    return {role: array.T if transposed and array.ndim == 2 else array for role, array in out.items()}


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("fused", "transposed", "interleaved"),
    [
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (True, True, True),
    ],
)
def test_every_layout_from_a_file(
    tmp_path: Path, dtype: str, bias: bool, fused: bool, transposed: bool, interleaved: bool
) -> None:
    """Three experts stacked in fused tensors, read as slabs, at an odd offset within the file."""
    experts = [made(seed, bias=bias) for seed in range(3)]
    rows = [layouts(w, fused, transposed, interleaved) for w in experts]
    with CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.add("before", np.zeros(1, np.int8))
        for role in rows[0]:
            writer.add(role, stored(np.stack([row[role] for row in rows]), dtype), dtype)
        checkpoint = writer.finish()
    for e, w in enumerate(experts):
        parts = [
            Part.of(
                checkpoint.tensors[role], role, slab=e,
                transposed=transposed and "bias" not in role, interleaved=interleaved and "gate_up" in role,
            )
            for role in rows[0]
        ]  # fmt: skip
        raws = load(checkpoint, parts)
        assert all(p.file.read_bytes()[p.offset : p.offset + p.nbytes] == r.tobytes() for p, r in zip(parts, raws, strict=True))
        same(decode(parts, raws), w)
        assert stored_format(parts) == dtype.lower()
        expert = view(parts, raws)
        assert expert.up.format == dtype.lower()
        if not transposed:
            assert all(any(np.shares_memory(m.data, raw) for raw in raws) for m in (expert.gate, expert.up, expert.down) if m)


def test_without_a_gate() -> None:
    w = made(gated=False, bias=False)
    parts, raws = parts_of({"up": w.up_FD, "down": w.down_DF})
    same(decode(parts, raws), w)


def parts_of(arrays: dict[str, np.ndarray], **flags: bool) -> tuple[list[Part], list[np.ndarray]]:
    names = {np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16", np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8"}
    parts = [
        Part(role, Path("f"), 0, a.nbytes, names[a.dtype], a.shape, **(flags if role == "gate_up" else {}))
        for role, a in arrays.items()
    ]
    # One byte off, as in a file whose header has an odd length.
    return parts, [np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:] for a in arrays.values()]


def test_mxfp4_agrees_with_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    arrays = {
        "gate_up": rng.integers(0, 256, (2 * F, D // 32, 16), dtype=np.uint8),
        "gate_up_scales": rng.integers(100, 140, (2 * F, D // 32), dtype=np.uint8),
        "gate_up_bias": to_bf16(rng.standard_normal(2 * F).astype(np.float32)),
        "down": rng.integers(0, 256, (D, F // 32, 16), dtype=np.uint8),
        "down_scales": rng.integers(100, 140, (D, F // 32), dtype=np.uint8),
        "down_bias": to_bf16(rng.standard_normal(D).astype(np.float32)),
    }
    parts, raws = parts_of(arrays, interleaved=True)
    assert stored_format(parts) == "mxfp4"
    got = decode(parts, raws)

    def theirs(role: str) -> np.ndarray:
        blocks, scales = torch.from_numpy(arrays[role])[None], torch.from_numpy(arrays[role + "_scales"])[None]
        return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].numpy()  # [in, out]

    gate_up = theirs("gate_up")
    assert gate_up.shape == (D, 2 * F)
    bias = to_f32(arrays["gate_up_bias"])
    want = ExpertWeights(
        gate_up[:, 0::2].T, gate_up[:, 1::2].T, theirs("down").T, bias[0::2], bias[1::2], to_f32(arrays["down_bias"])
    )
    same(got, want)
    # Repacked as stored, the codes are the same ones.
    record = Record.of(ExpertSpec(D, F, bias=True), parse_codec("stored", stored_format(parts)))
    buffer = np.empty(record.nbytes, np.uint8)
    record.write(encode(view(parts, raws), record.codec), buffer)
    same(weights_of(record.view(buffer)), want)
    np.testing.assert_array_equal(record.view(buffer).down.data, arrays["down"].reshape(D, -1))


def test_what_cannot_be_decoded() -> None:
    w = made(bias=False)
    arrays = {"gate": w.gate_FD, "up": w.up_FD, "down": w.down_DF}
    parts, raws = parts_of(arrays | {"down": w.down_DF.astype(np.int8)})
    with pytest.raises(CheckpointError, match="stored as I8"):
        decode(parts, raws)
    parts, raws = parts_of(arrays | {"down": np.zeros((D, F // 2), np.uint8)})
    with pytest.raises(CheckpointError, match="U8 without scales"):
        decode(parts, raws)
    parts, raws = parts_of(arrays | {"down": w.down_DF[:-1]})
    with pytest.raises(CheckpointError, match="do not fit"):
        decode(parts, raws)
    parts, _ = parts_of(arrays | {"down": to_bf16(w.down_DF)})
    assert stored_format(parts) == "f32"


@pytest.mark.parametrize("name", ["int8:16", "int4", "q4", "", "int8:g", "f64", "int4:32/3", "nested:64/5", "nested", "stored/2"])
def test_unknown_codecs(name: str) -> None:
    with pytest.raises(InputError, match="unknown codec"):
        parse_codec(name)


def test_codec_names() -> None:
    assert parse_codec("int8:g64") == parse_codec("int8:64") == Codec("int8", 64, True)
    assert parse_codec("stored", "bf16") == Codec("bf16")
    rows, tiles = parse_codec("stored", "mxfp4"), parse_codec("mxfp4")
    assert (rows, tiles) == (Codec("mxfp4", 32), Codec("mxfp4", 32, True)) and rows.name == "stored"
    for name in (*CODECS[1:], "nested:64/2", "nested:32/3"):
        assert parse_codec(name).name == name
    assert parse_codec("nested:64/4") == parse_codec("nested:64") == Codec("nested", 64, True, 4)
    assert keeps_weights(Codec("bf16"), "bf16") and keeps_weights(Codec("f32"), "f16") and keeps_weights(tiles, "mxfp4")
    assert not keeps_weights(Codec("bf16"), "f16") and not keeps_weights(Codec("int8", 64, True), "bf16")


def test_what_a_trunk_can_be_kept_as() -> None:
    assert parse_trunk_codec("stored") is None and parse_trunk_codec("int4:32") == Codec("int4", 32, True)
    for name in ("bf16", "nested:64", "nonsense"):
        with pytest.raises(InputError):
            parse_trunk_codec(name)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(CODECS[1:]), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.booleans(), st.integers(0, 1 << 30)
)  # fmt: skip
def test_records(name: str, d: int, f: int, gated: bool, bias: bool, seed: int) -> None:
    spec = ExpertSpec(128 * d, 128 * f, gated=gated, bias=bias)
    codec = parse_codec(name)
    record = Record.of(spec, codec)
    assert all(size % 4096 == 0 for size in record.sizes) and all(field.offset % 64 == 0 for field in record.fields)
    assert len(record.sizes) == (3 if codec.format == "nested" else 1) and sorted(set(record.sizes)) == list(record.sizes)
    ends = [0, *(field.offset + field.nbytes for field in record.fields)]
    assert all(field.offset >= end for field, end in zip(record.fields, ends, strict=False)) and ends[-1] <= record.nbytes
    w = made(seed, spec.d_model, spec.d_expert, gated, bias)
    coded = encode(w, codec)
    buffer = np.full(record.nbytes, 255, np.uint8)
    record.write(coded, buffer)
    expert = record.view(buffer)
    same(weights_of(expert), weights_of(coded))
    held = expert.up.data if isinstance(expert.up, Matrix) else expert.up.parts[0]
    assert np.shares_memory(held, buffer) and (expert.up.format, expert.up.group, not isinstance(expert.up, Matrix)) == codec[:3]
    again = np.empty_like(buffer)
    record.write(expert, again)
    np.testing.assert_array_equal(again, buffer)
    got = weights_of(expert)
    if codec.format in ("f32", "f16", "bf16"):
        same(got, w)  # drawn to be exact in these
        return
    for x, y in ((w.up_FD, got.up_FD), (w.down_DF, got.down_DF), (w.gate_FD, got.gate_FD)):
        if x is None or y is None:
            continue
        top = np.abs(x).reshape(len(x), -1, codec.group).max(-1, keepdims=True)
        error = np.abs(x - y).reshape(len(x), -1, codec.group)
        # Half a step of rounding (a whole one at int4's clipped end, -8..7); MXFP4's coarsest step is 2 of at most 8. The others
        # may shrink a group's range, and a nested one starts from two bits.
        bound = {"int8": top / 254, "int4": top / 8, "uint4": top / 14, "mxfp4": top / 4}.get(codec.format, top)
        assert (error <= bound * 1.01 + 1e-6).all()
    if bias:
        assert got.up_F is not None
        np.testing.assert_array_equal(got.up_F, w.up_F)  # biases are never quantised


def test_sizes_of_records() -> None:
    """OLMoE's experts: bits per weight as the formats promise."""
    spec = ExpertSpec(2048, 1024)
    bits = {name: Record.of(spec, parse_codec(name)).nbytes * 8 / spec.parameters for name in CODECS[1:]}
    assert bits["f32"] == 32 and bits["bf16"] == bits["f16"] == 16
    assert bits["int8:64"] == 8.25 and bits["int4:32"] == 4.5 and bits["int4:128"] == 4.125 and bits["mxfp4"] == 4.25
    assert bits["uint4:32"] == 5 and bits["uint4:64"] == 4.5
    nested = Record.of(spec, parse_codec("nested:64"))
    assert [8 * size / spec.parameters for size in nested.sizes] == [2.375, 3.625, 4.875]


def test_the_beginning_of_a_nested_record_is_a_coarser_expert() -> None:
    spec = ExpertSpec(128, 64, bias=True)
    record = Record.of(spec, parse_codec("nested:64"))
    w = made(3, spec.d_model, spec.d_expert)
    whole = np.empty(record.nbytes, np.uint8)
    record.write(encode(w, record.codec), whole)
    errors = []
    for planes in (2, 3, 4):
        some = whole[: record.size(planes)].copy()
        expert = record.view(some, planes)
        assert expert.up.planes == planes
        same(weights_of(expert), weights_of(record.view(whole, planes)))
        np.testing.assert_array_equal(expert.down_bias, w.down_D)
        errors.append(float(np.square(weights_of(expert).up_FD - w.up_FD).mean()))
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2], "each plane takes a good part of the error away"
    assert record.size() == record.size(4) == record.nbytes


def test_rows_and_tiles_of_mxfp4_hold_the_same_values() -> None:
    rng = np.random.default_rng(0)
    rows = Matrix(rng.integers(0, 256, (40, 32), dtype=np.uint8), "mxfp4", rng.integers(100, 140, (40, 2), dtype=np.uint8))
    tiles = encode_matrix(rows, parse_codec("mxfp4"))
    np.testing.assert_array_equal(tiles.dequantise(), rows.dequantise())
    assert encode_matrix(rows, parse_codec("stored", "mxfp4")) is rows and encode_matrix(tiles, parse_codec("mxfp4")) is tiles


def test_codecs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"rows of 96[^$]*group of 32[^$]*int8:32"):
        Record.of(ExpertSpec(64, 96), parse_codec("int8:64"))
    with pytest.raises(InputError, match=r"rows of 48[^$]*bf16"):
        Record.of(ExpertSpec(64, 48), parse_codec("mxfp4"))
    w = made(bias=False)
    big = ExpertWeights(w.gate_FD, w.up_FD * 1e6, w.down_DF)
    with pytest.raises(CheckpointError, match="does not fit f16"):
        encode(big, parse_codec("f16"))
    w.up_FD[3, 5] = np.nan
    with pytest.raises(CheckpointError, match="cannot be stored as int4:32"):
        encode(w, parse_codec("int4:32"))


def test_encoding_keeps_what_is_in_the_format_already() -> None:
    w = made()
    coded = encode(w, parse_codec("int4:32"))
    assert encode(coded, parse_codec("int4:32")).up is coded.up
    bits = Matrix(reference_to_bf16(w.up_FD, np.empty(w.up_FD.shape, np.uint16)), "bf16")
    expert = ExpertView(bits, bits, Matrix(w.down_DF, "f32"))
    assert encode(expert, Codec("bf16", 0)).up is bits
    assert encode(expert, Codec("bf16", 0)).down.format == "bf16"
