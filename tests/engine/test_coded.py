"""Checkpoints whose matrices are tiles: they run as they lie, with the bits of a packed folder, and open in transformers dequantised."""

import json
import re

import numpy as np
import pytest
import torch

from moestro.core.errors import CheckpointError, InputError
from moestro.core.experts import ExpertKey
from moestro.engine.pack import pack
from moestro.engine.store import PackedStore
from moestro.kernels.packed import Packed, quantise
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs import coded
from moestro.models.codecs.encode import ROUNDED, parse_codec
from moestro.models.codecs.trunk import encode_rows
from moestro.models.experts import read_expert
from moestro.models.families import describe
from moestro.models.native import describe as native
from moestro.models.native.weights import matrices
from moestro.models.open import open_model
from moestro.models.writer import CheckpointWriter

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 30)]
WIDE = {"hidden_size": 64, "intermediate_size": 64}


def code(folder, out, codec="int4:32", trunk="int8:32", codec_of=None):
    """The checkpoint in `folder` with every expert matrix and trunk matrix coded. codec_of: by expert, in place of `codec`."""
    checkpoint = Checkpoint.open(folder)
    layout = describe(checkpoint)
    made: dict[str, Packed] = {}
    for name in matrices(native(checkpoint, layout)) if trunk else ():
        if name in checkpoint.tensors:
            made[name] = encode_rows(checkpoint, name, parse_codec(trunk))
    plain = {name for name in layout.trunk if name not in made}
    biases = {}
    for la in layout.facts.layers:
        first = next(n for n in checkpoint.tensors if f"layers.{la.index}." in n and n not in layout.trunk)
        base = re.sub(r"experts\..*", "experts", first)
        for e in range(la.num_experts):
            weights = read_expert(checkpoint, layout, ExpertKey(la.ordinal, e))
            kind = parse_codec(codec_of(e) if codec_of else codec)
            for role, array in (("gate", weights.gate_FD), ("up", weights.up_FD), ("down", weights.down_DF)):
                if array is not None:
                    made[f"{base}.{e}.{role}_proj.weight"] = quantise(array, kind.format, kind.group)
            for role, array in (("gate", weights.gate_F), ("up", weights.up_F), ("down", weights.down_D)):
                if array is not None:
                    biases[f"{base}.{e}.{role}_proj.bias"] = array
    said = coded.describe({n: (coded.codec_of(p).name, p.shape) for n, p in made.items()}, ["experts are in fewer bits"])
    with CheckpointWriter(out, checkpoint.config | {"quantization_config": said}) as writer:
        for name, packed in made.items():
            writer.stream(name, "U8", (coded.coded_bytes(coded.codec_of(packed).name, packed.shape),), coded.bytes_of(packed))
        for name, bias in biases.items():
            writer.add(name, bias)
        for name in plain:
            writer.copy(name, checkpoint)
        writer.finish()
    return out


@pytest.mark.parametrize("codec", ["int8:32", "int4:32", "int3:64", "int2:32", "mxfp4", "nested:32"])
def test_runs_with_the_bits_of_a_packed_folder(codec, tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, layout = opened(folder)
    out = code(folder, tmp_path / "coded", codec)
    store = PackedStore(pack(checkpoint, layout, codec, tmp_path / "packed", trunk_codec="int8:32"), layout.facts)
    a = engine(folder, "minimal", store=store, trunk="native", trunk_codec="int8:32")
    b = engine(out, "minimal", trunk="native")
    np.testing.assert_array_equal(*(next(e.run([TOKENS])).logits_TV for e in (a, b)))
    assert b.changes == ("experts are in fewer bits", ROUNDED)
    assert b.facts.expert_bytes == sum(ref.nbytes for ref in Checkpoint.open(out).tensors.values() if "experts." in ref.name)


@pytest.mark.parametrize(
    ("family", "layout"), [("qwen3_moe", "fused"), ("gpt_oss", "fused"), ("llama4_text", None), ("deepseek_v3", None)]
)
def test_every_form_of_experts_comes_out_one_by_one(family, layout, tmp_path, tiny, opened, engine):
    wide = {"hidden_size": 64, "intermediate_size": 64} | (
        {"moe_intermediate_size": 64} if family in ("qwen3_moe", "deepseek_v3") else {}
    )
    folder, _ = tiny(family, layout, **wide)
    checkpoint, found = opened(folder)
    out = code(folder, tmp_path / "coded", "int4:32", trunk="")
    store = PackedStore(pack(checkpoint, found, "int4:32", tmp_path / "packed"), found.facts)
    a, b = engine(folder, "minimal", store=store), engine(out, "minimal")
    np.testing.assert_array_equal(*(next(e.run([TOKENS])).logits_TV for e in (a, b)))


def test_a_live_model_computes_with_what_the_tiles_stand_for(tmp_path, tiny, engine):
    folder, _ = tiny("mixtral", **WIDE)
    out = code(folder, tmp_path / "coded")
    live = open_model(out, "float32")
    want = next(live.run([TOKENS])).logits_TV.numpy()
    found = next(engine(out, trunk="native").run([TOKENS])).logits_TV
    assert (
        np.sqrt(np.square(found - want).mean() / np.square(want).mean()) < 0.06
    )  # activations are rounded, and a few choices of experts with them
    packed = coded.read_coded(live.checkpoint, "model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(live.module.model.layers[0].self_attn.q_proj.weight, torch.from_numpy(packed.dequantise()))


def test_experts_of_a_layer_may_differ_in_bits(tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral", **WIDE)
    out = code(folder, tmp_path / "coded", codec_of=lambda e: ("int2:32", "int4:32", "int8:32", "nested:32")[e % 4])
    checkpoint, layout = opened(out)
    for size in ("minimal", "full"):
        a = next(engine(out, size, trunk="native").run([TOKENS])).logits_TV
        assert np.isfinite(a).all()
    np.testing.assert_array_equal(a, next(engine(out, "minimal", trunk="native").run([TOKENS])).logits_TV)
    again = PackedStore(pack(checkpoint, layout, "stored", tmp_path / "packed"), layout.facts)
    np.testing.assert_array_equal(a, next(engine(out, store=again, trunk="native").run([TOKENS])).logits_TV)


def test_a_coded_trunk_is_not_coded_again(tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral", **WIDE)
    out = code(folder, tmp_path / "coded")
    checkpoint, layout = opened(out)
    with pytest.raises(InputError, match="already"):
        pack(checkpoint, layout, "stored", tmp_path / "packed", trunk_codec="int4:32")


def test_copies_keep_the_bytes(tmp_path, tiny):
    folder, _ = tiny("mixtral", **WIDE)
    source = Checkpoint.open(code(folder, tmp_path / "coded"))
    with CheckpointWriter(tmp_path / "copy", source.config) as writer:
        for name in source.tensors:
            writer.copy(name, source)
        made = writer.finish()
    for name, ref in source.tensors.items():
        assert (made.tensors[name].dtype, made.tensors[name].shape) == (ref.dtype, ref.shape)


@pytest.mark.parametrize("change", ["format", "codec", "shape", "name", "absent"])
def test_a_configuration_that_does_not_fit_is_refused(change, tmp_path, tiny):
    folder, _ = tiny("mixtral", **WIDE)
    out = code(folder, tmp_path / "coded")
    config = json.loads((out / "config.json").read_text())
    said = config["quantization_config"]
    experts = said["tensors"]["int4:32"]
    name = next(iter(experts))
    match change:
        case "format":
            said["format"] = 2
        case "codec":
            said["tensors"] = {"int5:32": experts}
        case "shape":
            experts[name] = [64, 128]
        case "name":
            experts["nothing.weight"] = experts.pop(name)
        case "absent":
            del said["tensors"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        Checkpoint.open(out)


def test_broken_scales_are_found(tmp_path, tiny, engine):
    folder, _ = tiny("mixtral", **WIDE)
    out = code(folder, tmp_path / "coded")
    ref = Checkpoint.open(out).tensors["model.layers.1.block_sparse_moe.experts.2.down_proj.weight"]
    with open(ref.file, "r+b") as f:
        f.seek(ref.offset)
        f.write(np.full(16, np.nan, np.float16).tobytes())
    with pytest.raises(CheckpointError, match="not finite"):
        next(engine(out, trunk="native").run([TOKENS]))
