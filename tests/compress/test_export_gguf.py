"""GGUF files hold the numbers of the coded checkpoint; llama.cpp's own run is compared in benchmarks/exports.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from moestro.build.gguf import unpermute
from moestro.compress.bits import blank, encode_experts, encode_trunk
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.export.coded import CodedJob
from moestro.compress.export.gguf import blocks, gguf
from moestro.compress.trunk import trunk_matrices
from moestro.core.errors import CoverageError, InputError, StorageError, UnsupportedModel
from moestro.kernels.packed import quantise
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import read_coded
from moestro.models.families import describe
from moestro.testing.tiny import save_tiny

WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
MORE = {
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": []},
    "mixtral": {},
}


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    def get(family, codec, rows=None):
        folder = tmp_path_factory.mktemp(family)
        save_tiny(family, folder / "model", **WIDE, **MORE.get(family, {}))
        checkpoint = Checkpoint.open(folder / "model")
        layout = describe(checkpoint)
        plan = encode_experts(blank(checkpoint, layout, "by.hand"), layout, "compress.encode.rtn", rows or codec)
        rtn = ("compress.encode.rtn", codec)
        plan = encode_trunk(plan, trunk_matrices(checkpoint, layout), inner=rtn, outer=rtn)
        return compress(plan, checkpoint, layout, folder / "coded", encoder=Encoder(plan, layout.facts), form=CodedJob).checkpoint

    return get


@pytest.mark.parametrize("codec", ["int8:32", "int4:64", "uint4:32", "mxfp4"])
def test_blocks_are_ggmls(codec):
    from gguf import GGMLQuantizationType

    w_RC = np.random.default_rng(0).standard_normal((20, 128)).astype(np.float32)
    packed = quantise(w_RC, codec.partition(":")[0], int(codec.partition(":")[2] or 32))
    kind = {"int8": "Q8_0", "int4": "Q4_0", "uint4": "Q4_1", "mxfp4": "MXFP4"}[packed.format]
    read = dequantize(blocks(packed), GGMLQuantizationType[kind])
    np.testing.assert_allclose(read, packed.dequantise(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("family", "codec"), [("olmoe", "int4:32"), ("mixtral", "int8:32"), ("qwen3_moe", "mxfp4")])
def test_a_file_holds_the_whole_model(family, codec, coded, tmp_path):
    source = coded(family, codec)
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [3, 2]}
    (source.path / "generation_config.json").write_text(json.dumps(generation))
    reader = GGUFReader(gguf(source, tmp_path / "m.gguf", pre="gpt-2"))
    tensors = {t.name: t for t in reader.tensors}
    base = "model.layers.1." + ("block_sparse_moe" if family == "mixtral" else "mlp")
    stack = dequantize(tensors["blk.1.ffn_down_exps.weight"].data, tensors["blk.1.ffn_down_exps.weight"].tensor_type)
    leaf = "w2" if f"{base}.experts.0.w2.weight" in source.tensors else "down_proj"
    for e in range(len(stack)):
        np.testing.assert_allclose(
            stack[e], read_coded(source, f"{base}.experts.{e}.{leaf}.weight").dequantise(), rtol=1e-6, atol=1e-7
        )
    query = dequantize(tensors["blk.0.attn_q.weight"].data, tensors["blk.0.attn_q.weight"].tensor_type)
    if family == "mixtral":
        query = unpermute(query, source.config["num_attention_heads"])
    np.testing.assert_allclose(
        query, read_coded(source, "model.layers.0.self_attn.q_proj.weight").dequantise(), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(
        tensors["blk.2.ffn_gate_inp.weight"].data, source.read(f"{base.replace('.1.', '.2.')}.gate.weight")
    )
    experts = sum(".experts." in name for name in source.tensors)
    assert len(tensors) == len(source.tensors) - experts + 3 * 3
    said = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items() if not name.endswith("tokens")}
    assert "assistant" in said["chat_template"], "the template of tokenizer_config.json"
    assert (said["ggml.eos_token_id"], said["ggml.eot_token_id"], said["ggml.add_bos_token"]) == (2, 3, False)
    assert said["sampling.temp"] == pytest.approx(0.6) and said["sampling.top_k"] == 20 and "sampling.top_p" not in said
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == source.config["vocab_size"]
    vocabulary = json.loads((source.path / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(tokens[i] == token for token, i in vocabulary.items())


def test_what_does_not_fit_is_refused(coded, tmp_path):
    with pytest.raises(UnsupportedModel, match="pre-tokenizer"):
        gguf(coded("olmoe", "int4:32"), tmp_path / "m.gguf")
    with pytest.raises(InputError, match="no block"):
        gguf(coded("olmoe", "int3:32"), tmp_path / "m.gguf")
    mixed = coded("olmoe", "int4:32", [["int4:32" if e else "int8:32" for e in range(8)]] * 3)
    with pytest.raises(InputError, match="one codec"):
        gguf(mixed, tmp_path / "m.gguf")
    save_tiny("deepseek_v3", tmp_path / "ds")
    with pytest.raises(UnsupportedModel, match="deepseek_v3"):
        gguf(Checkpoint.open(tmp_path / "ds"), tmp_path / "m.gguf")
    save_tiny("qwen3_moe", tmp_path / "fused", "fused", norm_topk_prob=True, mlp_only_layers=[])
    with pytest.raises(CoverageError, match="no place"):
        gguf(Checkpoint.open(tmp_path / "fused"), tmp_path / "m.gguf")
    save_tiny("olmoe", tmp_path / "odd", norm_topk_prob=True)
    with pytest.raises(UnsupportedModel, match="settings"):
        gguf(Checkpoint.open(tmp_path / "odd"), tmp_path / "m.gguf")
    (tmp_path / "there.gguf").write_text("")
    with pytest.raises(StorageError, match="exists"):
        gguf(Checkpoint.open(tmp_path / "odd"), tmp_path / "there.gguf")
    assert sorted(p.name for p in tmp_path.glob("*.gguf*")) == ["there.gguf"]
