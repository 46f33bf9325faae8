"""The benchmark's checkpoint in the peers' formats: GGUF for llama.cpp, and fused experts as transformers 5 holds them in memory."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
from shapes import Shape, Shards, flush, from_bf16, header, write_all, write_json


def write_gguf(checkpoint: Path, path: Path, shape: Shape, *, f32_matrices: bool = False, say=print) -> Path:
    """The same weights for llama.cpp, matrices bf16, norms and routers f32 (as its converter does). Streams; kept if complete.

    f32_matrices writes all as f32, for checking that both programs compute the same function.

    llama.cpp's olmoe graph rotates halves (NeoX order) as transformers does, so queries and keys are not permuted.
    """
    if path.exists():
        return path
    import gguf

    bf16, f32 = gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.F32
    source = Shards(checkpoint)
    names: list[tuple[str, list[str], bool]] = [("token_embd.weight", ["model.embed_tokens.weight"], False)]
    for i in range(shape.layers):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        plain = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
        plain |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        names += [(f"{b}{k}.weight", [f"{p}{v}.weight"], True) for k, v in plain.items()]
        square = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
        names += [(f"{b}{k}.weight", [f"{p}self_attn.{v}.weight"], False) for k, v in square.items()]
        for part in ("gate", "down", "up"):
            every = [f"{p}mlp.experts.{e}.{part}_proj.weight" for e in range(shape.experts)]
            names.append((f"{b}ffn_{part}_exps.weight", every, False))
    names += [("output_norm.weight", ["model.norm.weight"], True), ("output.weight", ["lm_head.weight"], False)]

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(temporary, "olmoe")
    writer.add_name(shape.name)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.expert_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if f32_matrices else gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    names = [(name, parts, wide or f32_matrices) for name, parts, wide in names]
    for name, parts, wide in names:
        size = source.places[parts[0]][3]
        size = (len(parts), *size) if len(parts) > 1 else size
        count = math.prod(size)
        # A bf16 tensor is announced by its shape in bytes, which is how the writer takes every type numpy lacks.
        dims = size if wide else (*size[:-1], size[-1] * 2)
        writer.add_tensor_info(
            name, dims, np.dtype(np.float32) if wide else np.dtype(np.uint8), count * (4 if wide else 2), f32 if wide else bf16
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    began = time.perf_counter()
    assert writer.fout is not None
    out = writer.fout[0]
    synced = 0
    for _, parts, wide in names:
        data = [source.read(part) for part in parts]
        bits = np.stack(data) if len(data) > 1 else data[0]
        array = from_bf16(bits) if wide else bits.view(np.uint8)
        writer.write_tensor_data(array)
        out.flush()
        flush(out, synced, out.tell())
        synced = out.tell()
    writer.close()
    os.replace(temporary, path)
    size_mb = path.stat().st_size / 1e6
    say(f"  {path.name}: {size_mb / 1e3:.2f} GB at {size_mb / (time.perf_counter() - began):.0f} MB/s")
    return path


def write_fused(checkpoint: Path, folder: Path, shape: Shape, *, say=print) -> Path:
    """The same weights as transformers 5 names them in memory: gate_up_proj [E, 2F, D] and down_proj [E, D, F] of each layer.

    With these names accelerate offloads by mapping the files as they are; from the published layout it would convert and write
    every offloaded weight anew at each start. So this is its best case. One file per layer; kept if complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Shards(checkpoint)
    groups: list[dict[str, list[str]]] = []  # file -> tensor -> its parts, in the order they are laid down
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        plain = {n: [n] for n in source.places if n.startswith(p) and ".experts." not in n}
        e = [f"{p}mlp.experts.{x}." for x in range(shape.experts)]
        plain[p + "mlp.experts.gate_up_proj"] = [f"{x}{part}_proj.weight" for x in e for part in ("gate", "up")]
        plain[p + "mlp.experts.down_proj"] = [f"{x}down_proj.weight" for x in e]
        groups.append(plain)
    groups.append({n: [n] for n in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight")})
    d, f = shape.width, shape.expert_width
    where: dict[str, str] = {}
    began, written = time.perf_counter(), 0
    for i, group in enumerate(groups):
        path = folder / f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        where |= dict.fromkeys(group, path.name)
        sizes = {n: source.places[parts[0]][3] for n, parts in group.items()}
        sizes |= {n: (shape.experts, 2 * f, d) if "gate_up" in n else (shape.experts, d, f) for n in group if ".experts." in n}
        head = header(sizes)
        whole = len(head) + sum(2 * math.prod(s) for s in sizes.values())
        if path.exists() and path.stat().st_size == whole:
            continue
        temporary = path.with_suffix(".partial")
        with open(temporary, "wb", buffering=0) as out:
            write_all(out, head)
            for parts in group.values():
                for part in parts:
                    write_all(out, memoryview(source.read(part)).cast("B"))
            flush(out, 0, out.tell())
        os.replace(temporary, path)
        written += whole
    for name in ("config.json", "generation_config.json"):
        shutil.copy(checkpoint / name, folder / name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    if written:
        say(f"  {folder.name}: {written / 1e9:.2f} GB at {written / 1e6 / (time.perf_counter() - began):.0f} MB/s")
    return folder
