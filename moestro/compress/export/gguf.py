"""GGUF: the file that llama.cpp runs, from a coded or plain checkpoint, with the same numbers.

Paper      none; the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py
Idea       The blocks of ggml hold what the tiles hold, in another order: Q8_0 is int8, Q4_0 is int4, Q4_1 is uint4, MXFP4 is mxfp4.
Rule       of each 32 inputs of a row: scale, (minimum,) codes; a scale that more inputs share is repeated; four-bit codes of the first 16
           inputs lie in the low nibbles; experts of a layer are stacked; query and key rows of 'llama' are interleaved for its rope
Needs      a checkpoint of Mixtral, OLMoE or Qwen3-MoE with a byte-level BPE tokenizer
Gives      one .gguf file
Departs    nothing; codecs without a block (int3, int2, nested) and pre-tokenizers whose name is not known are refused
Checked    the gguf package dequantises every block to what the tiles stand for; llama.cpp computes the engine's logits (benchmarks/exports.py)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moestro.compress.dropping import lost_tensors, pattern_of
from moestro.compress.export.compressed_tensors import nibbles_of
from moestro.compress.export.gguf_tokenizer import add_tokenizer
from moestro.core.errors import CoverageError, InputError, StorageError, UnsupportedModel
from moestro.core.method import method
from moestro.kernels.convert import to_f32
from moestro.kernels.packed import BLOCK, Packed, whole_numbers
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import is_coded, read_coded
from moestro.models.codecs.encode import parse_codec
from moestro.models.families import describe
from moestro.models.writer import check_room

TYPES = {"int8": "Q8_0", "int4": "Q4_0", "uint4": "Q4_1", "mxfp4": "MXFP4", "F32": "F32", "F16": "F16", "BF16": "BF16"}
SIZES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "MXFP4": 17}  # bytes of a block of 32
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_NAME = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)\.weight")
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?P<e>\d+)\.(?P<leaf>\w+)")
ARCHITECTURES = {"mixtral": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3moe"}


class Planned(NamedTuple):
    """One tensor of the file. sources: names in the checkpoint, several for stacked experts. heads: to interleave rows for, or 0."""

    name: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    heads: int = 0


@method("compress.export.gguf", kind="export", fidelity="exact")
def gguf(checkpoint: Checkpoint, out: str | Path, *, pre: str = "", overwrite: bool = False, dropped: Iterable[str] = ()) -> Path:
    """Write the file `out`. pre: llama.cpp's name of the pre-tokenizer, where it is not recognised.

    dropped: patterns of tensors that the model does not load, such as layers for multi-token prediction: they have no place in the file.

    Raises UnsupportedModel for other families, settings or tokenizers, InputError for codecs without a block, CoverageError for
    tensors that have no place in the file, StorageError.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    out = Path(out)
    if out.exists() and not overwrite:
        raise StorageError(f"{out} exists already", fix="choose another file, or remove it first")
    config = checkpoint.config
    arch = architecture(config)
    planned = plan_tensors(checkpoint, arch, dropped)
    check_room(out, sum(_bytes(one) for one in planned))
    temporary = out.with_name(out.name + ".partial")
    try:
        writer = GGUFWriter(temporary, arch)
        _settings(writer, config, arch)
        add_tokenizer(writer, checkpoint.path, config, pre)
        for one in planned:
            kind = GGMLQuantizationType[one.kind]
            size = _stored(one)
            nbytes = _bytes(one)
            dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(one.kind, np.uint8))
            stored = size if one.kind != "BF16" else (*size[:-1], 2 * size[-1])
            writer.add_tensor_info(one.name, stored, dtype, nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in planned:
            writer.write_tensor_data(np.concatenate(list(_rows(checkpoint, one))))
        writer.close()
        checkpoint.unchanged()
        os.replace(temporary, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}", fix="make room, or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _stored(one: Planned) -> tuple[int, ...]:
    return one.shape if one.kind not in SIZES else (*one.shape[:-1], one.shape[-1] // BLOCK * SIZES[one.kind])


def _bytes(one: Planned) -> int:
    return math.prod(_stored(one)) * {"F32": 4, "F16": 2, "BF16": 2}.get(one.kind, 1)


def architecture(config: dict[str, Any]) -> str:
    """llama.cpp's name of the family. Raises UnsupportedModel, also for settings that its code does not compute."""
    family = str(config.get("model_type"))
    if family not in ARCHITECTURES:
        raise UnsupportedModel(f"GGUF files of {family} are not written", expected=", ".join(ARCHITECTURES))
    rope = config.get("rope_parameters") or {}
    wrong = {
        "olmoe": config.get("norm_topk_prob")
        or config.get("clip_qkv") is not None
        or config["num_key_value_heads"] != config["num_attention_heads"],
        "qwen3_moe": not config.get("norm_topk_prob")
        or config.get("mlp_only_layers")
        or config.get("decoder_sparse_step", 1) != 1,
        "mixtral": config.get("sliding_window") is not None,
    }[family]
    if wrong or rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UnsupportedModel(
            f"this {family} has settings that llama.cpp does not compute",
            expected="the usual normalisation of routing weights, no clipping, no sliding window, plain rope, experts in every layer, in OLMoE as many heads of keys as of queries",
        )
    return ARCHITECTURES[family]


def plan_tensors(checkpoint: Checkpoint, arch: str, dropped: Iterable[str] = ()) -> list[Planned]:
    """Every tensor of the file. Raises CoverageError for tensors of the checkpoint without a place, InputError for codecs without a block."""
    config = checkpoint.config
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if arch == "llama" else {}
    out: list[Planned] = []
    stacks: dict[tuple[int, str], dict[int, str]] = {}
    lost = []
    layout = describe(checkpoint)
    ignored, named = set(layout.ignored), lost_tensors(dropped, layout)
    # llama.cpp computes the angles of rope itself, as every reader does.
    if unnamed := sorted(n for n in ignored - named if not n.endswith("rotary_emb.inv_freq")):
        raise CoverageError(
            f"{len(unnamed)} tensors that the model does not load have no place in the file, such as {unnamed[0]}",
            expected="the decoder's layers only",
            fix=f"allow their loss: --drop '{pattern_of(unnamed[0])}'",
        )
    for name, ref in checkpoint.tensors.items():
        if name in ignored:
            continue
        found = _NAME.fullmatch(name)
        if found and (expert := _EXPERT.fullmatch(found["rest"])) and expert["leaf"] in ROLES:
            stacks.setdefault((int(found["layer"]), ROLES[expert["leaf"]]), {})[int(expert["e"])] = name
        elif found and found["rest"] in LAYER:
            kind = LAYER[found["rest"]]
            plain = "F32" if len(ref.shape) == 1 or kind == "ffn_gate_inp" else _kind(ref.dtype, name)
            out.append(Planned(f"blk.{found['layer']}.{kind}.weight", plain, ref.shape, (name,), heads.get(kind, 0)))
        elif name.removesuffix(".weight") in TOP:
            kind = "F32" if len(ref.shape) == 1 else _kind(ref.dtype, name)
            out.append(Planned(f"{TOP[name.removesuffix('.weight')]}.weight", kind, ref.shape, (name,)))
        else:
            lost.append(name)
    if lost:
        raise CoverageError(
            f"{len(lost)} tensors have no place in the file, such as {lost[0]}", expected="a checkpoint with experts one by one"
        )
    for (layer, role), members in sorted(stacks.items()):
        names = tuple(members[e] for e in sorted(members))
        if len(kinds := {checkpoint.ref(name).dtype for name in names}) > 1:
            raise InputError(
                f"the experts of layer {layer} have {', '.join(sorted(kinds))}", expected="one codec, as GGUF stacks them"
            )
        ref = checkpoint.ref(names[0])
        out.append(Planned(f"blk.{layer}.ffn_{role}_exps.weight", _kind(ref.dtype, names[0]), (len(names), *ref.shape), names))
    return out


def blocks(packed: Packed) -> np.ndarray:
    """uint8 [rows, blocks * bytes of a block]: a matrix as ggml stores it."""
    planes = whole_numbers(packed)
    whole_RC, scale_RB = planes[0]
    rows, count = scale_RB.shape
    if packed.format == "int8":
        codes = whole_RC.astype(np.int8).view(np.uint8).reshape(rows, count, BLOCK)
    else:
        u_RC = (
            nibbles_of(whole_RC)
            if packed.format == "mxfp4"
            else (whole_RC + (8 if packed.format == "int4" else 0)).astype(np.uint8)
        )
        u = u_RC.reshape(rows, count, 2, BLOCK // 2)
        codes = u[:, :, 0] | u[:, :, 1] << 4
    if packed.format == "mxfp4":
        heads = [(np.rint(np.log2(scale_RB)) + 128).astype(np.uint8)[..., None]]
    else:
        heads = [s_RB.astype("<f2")[..., None].view(np.uint8) for _, s_RB in planes]
    return np.concatenate([*heads, codes], axis=-1).reshape(rows, -1)


def _kind(dtype: str, name: str) -> str:
    form = parse_codec(dtype).format if is_coded(dtype) else dtype
    if form not in TYPES:
        raise InputError(
            f"{name} is {dtype}, for which GGUF has no block", expected="int8:G, int4:G, uint4:G, mxfp4 or plain floats"
        )
    return TYPES[form]


def _rows(checkpoint: Checkpoint, one: Planned) -> Iterator[np.ndarray]:
    """The arrays that make one tensor of the file, in order."""
    for name in one.sources:
        ref = checkpoint.ref(name)
        array = blocks(read_coded(checkpoint, name)) if is_coded(ref.dtype) else checkpoint.read(name)
        if one.kind == "F32":
            array = to_f32(array)
        elif one.kind == "BF16":
            array = array.view(np.uint8).reshape(*array.shape[:-1], -1)
        if one.heads:
            array = interleaved(array, one.heads)
        yield array[None] if len(one.sources) > 1 else array


def interleaved(rows_RX: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as llama.cpp's 'llama' wants them; the inverse of what its files are read with."""
    half = len(rows_RX) // heads // 2
    return np.ascontiguousarray(rows_RX.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows_RX.shape))


def _settings(writer: Any, config: dict[str, Any], arch: str) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    dimension = config.get("head_dim") or width // heads
    experts = config.get("num_experts") or config.get("num_local_experts")
    theta = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0
    asked: list[tuple[Callable[[Any], None], Any]] = [
        (writer.add_block_count, config["num_hidden_layers"]),
        (writer.add_context_length, config["max_position_embeddings"]),
        (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, config["intermediate_size"]),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, config["num_key_value_heads"]),
        (writer.add_layer_norm_rms_eps, config["rms_norm_eps"]),
        (writer.add_rope_freq_base, theta),
        (writer.add_rope_dimension_count, dimension),
        (writer.add_key_length, dimension),
        (writer.add_value_length, dimension),
        (writer.add_expert_count, experts),
        (writer.add_expert_used_count, config["num_experts_per_tok"]),
        (writer.add_vocab_size, config["vocab_size"]),
    ]
    if arch == "qwen3moe":
        asked.append((writer.add_expert_feed_forward_length, config["moe_intermediate_size"]))
    for add, value in asked:
        add(value)
