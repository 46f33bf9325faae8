"""The benchmark's checkpoint in the peers' formats: GGUF for llama.cpp, and fused experts as transformers 5 holds them in memory."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from shapes import Shape, Shards, flush, from_bf16, header, write_all, write_json


def gguf_path(work: Path, shape: Shape, matrices: str) -> Path:
    """Where the GGUF of these matrices lies in the work folder."""
    return work / (f"{shape.name}.gguf" if matrices == "bf16" else f"{shape.name}.{matrices}.gguf")


def write_gguf(checkpoint: Path, path: Path, shape: Shape, *, matrices: str = "bf16", say=print) -> Path:
    """The same weights for llama.cpp, norms and routers f32 (as its converter does). Streams; kept if complete.

    matrices: bf16; f32, for checking that both programs compute the same function; or q4_0, every matrix, also embedding and head,
    quantised by moestro's int4:32 rule with float16 scales, so that both programs hold the same numbers.

    llama.cpp's olmoe graph rotates halves (NeoX order) as transformers does, so queries and keys are not permuted.
    """
    if path.exists():
        return path
    import gguf

    types = gguf.GGMLQuantizationType
    per_block = {"f32": (types.F32, 1, 4), "bf16": (types.BF16, 1, 2), "q4_0": (types.Q4_0, 32, 18)}  # type, weights, bytes
    file_type = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
    source = Shards(checkpoint)
    names: list[tuple[str, list[str], str]] = [("token_embd.weight", ["model.embed_tokens.weight"], matrices)]
    for i in range(shape.layers):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        plain = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
        plain |= {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        names += [(f"{b}{k}.weight", [f"{p}{v}.weight"], "f32") for k, v in plain.items()]
        square = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
        names += [(f"{b}{k}.weight", [f"{p}self_attn.{v}.weight"], matrices) for k, v in square.items()]
        for part in ("gate", "down", "up"):
            every = [f"{p}mlp.experts.{e}.{part}_proj.weight" for e in range(shape.experts)]
            names.append((f"{b}ffn_{part}_exps.weight", every, matrices))
    names += [("output_norm.weight", ["model.norm.weight"], "f32"), ("output.weight", ["lm_head.weight"], matrices)]

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(temporary, "olmoe")
    writer.add_name(shape.name)
    writer.add_context_length(shape.context)
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
    writer.add_file_type(file_type[matrices])
    writer.add_tokenizer_model("no_vocab")
    for name, parts, kind in names:
        size = source.places[parts[0]][3]
        size = (len(parts), *size) if len(parts) > 1 else size
        code, weights, nbytes = per_block[kind]
        # A tensor of a type that numpy lacks is announced by its shape in bytes.
        dims = size if kind == "f32" else (*size[:-1], size[-1] // weights * nbytes)
        dtype = np.dtype(np.float32 if kind == "f32" else np.uint8)
        writer.add_tensor_info(name, dims, dtype, math.prod(dims) * dtype.itemsize, code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    began = time.perf_counter()
    assert writer.fout is not None
    out = writer.fout[0]
    synced = 0
    for _, parts, kind in names:
        data = [encoded(source.read(part), kind) for part in parts]
        writer.write_tensor_data(np.stack(data) if len(data) > 1 else data[0])
        out.flush()
        flush(out, synced, out.tell())
        synced = out.tell()
    writer.close()
    os.replace(temporary, path)
    size_mb = path.stat().st_size / 1e6
    say(f"  {path.name}: {size_mb / 1e3:.2f} GB at {size_mb / (time.perf_counter() - began):.0f} MB/s")
    return path


def encoded(bits: np.ndarray, kind: str) -> np.ndarray:
    """A tensor's bf16 bits as GGUF holds them: float32 values, or bytes with the rows' shape kept."""
    if kind == "bf16":
        return bits.view(np.uint8)
    values = from_bf16(bits)
    return values if kind == "f32" else q4_0(values)


def q4_0(w_RC: np.ndarray) -> np.ndarray:
    """Q4_0 blocks of 18 bytes [R, C / 32 * 18]: a float16 scale, then 16 bytes with weights 0-15 in their low and 16-31 in their high nibbles."""
    from moestro.kernels.quantise import encode_int4

    matrix = encode_int4(w_RC, 32, scale_dtype="float16")
    assert matrix.scales is not None
    rows, groups = matrix.scales.shape
    pairs = matrix.data.reshape(rows, groups, 16)  # moestro keeps neighbours in one byte
    codes = np.empty((rows, groups, 32), np.uint8)
    codes[:, :, 0::2], codes[:, :, 1::2] = pairs & 15, pairs >> 4
    out = np.empty((rows, groups, 18), np.uint8)
    out[:, :, :2] = matrix.scales.view(np.uint8).reshape(rows, groups, 2)
    out[:, :, 2:] = codes[:, :, :16] | (codes[:, :, 16:] << 4)
    return out.reshape(rows, groups * 18)


def write_q4_k_m(source: Path, path: Path, *, threads: int, say=print) -> Path:
    """Q4_K_M of a bf16 GGUF by llama.cpp's own quantiser. Kept if complete. Raises RuntimeError when it refuses."""
    if path.exists():
        return path
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = threads, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    temporary = path.with_suffix(".partial")
    began = time.perf_counter()
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(temporary).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not write Q4_K_M of {source}: code {code}")
    os.replace(temporary, path)
    say(f"  {path.name}: {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
    return path


def write_packed(checkpoint: Path, work: Path, *, codec: str = "int4:32", say=print) -> Path:
    """moestro's own packed form, by its own command line: experts and trunk in this codec. Kept if complete."""
    from moestro.engine.store import FORMAT

    folder = work / f"{checkpoint.name}-{codec.replace(':', '-')}-format{FORMAT}"
    if folder.exists():
        return folder
    began = time.perf_counter()
    plan = folder.with_name(folder.name + ".plan.json")
    command = [sys.executable, "-m", "moestro"]
    codecs = ["--codec", codec, "--trunk-codec", codec]
    for arguments in (
        ["plan", "residency", str(checkpoint), "--memory", "64GiB", *codecs, "--output", str(plan), "--quiet"],
        ["apply", str(plan), "--output", str(folder), "--quiet"],
    ):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"moestro {arguments[0]} ended with code {done.returncode}: {done.stderr[-2000:]}")
    nbytes = sum(f.stat().st_size for f in folder.iterdir())
    say(f"  {folder.name}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
    return folder


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
