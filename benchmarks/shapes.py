"""A random checkpoint of OLMoE's shape, any size: `python shapes.py --out FOLDER --scale 1 [--gguf] [--fused]`.

The files look like the published ones: Hugging Face names, one tensor per expert matrix, sorted by name, bf16, shards of about 4 GB.
Every weight is random, except that the vocabulary is a walk on which greedy decoding never gets lost, whatever runs it:

* the output row of id t + 1 is the embedding of id t, so the most likely next token after id t is t + 1 (in its own half, wrapping);
* first half of the ids, `chain`: neighbours' embeddings are correlated (rho), so about 60 % of a layer's experts recur from the
  previous token, as in trained models; second half, `uniform`: independent embeddings, so experts recur by chance (K / E).

Thus one checkpoint gives both kinds of routing, prompts are ranges of ids, and an answer that leaves the walk shows a wrong engine.
Matrices are slices of one random block, each at its own offset and with its own mask of signs: 13.8 GB at the speed of the disk,
no two experts alike. Layer outputs are small against the residual stream (o_proj, down_proj), so logits stay finite and calm.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 25  # elements of the random block: 64 MiB in bf16
CHUNK = 1 << 22  # elements made and written at a time
FORMAT = 1
# Scale of each matrix: projections give outputs of about unit size; what returns to the residual stream is kept small.
GAIN = {
    "q_proj": 1.0,
    "k_proj": 1.0,
    "v_proj": 1.0,
    "o_proj": 0.125,
    "gate": 2.0,
    "gate_proj": 1.0,
    "up_proj": 1.0,
    "down_proj": 0.5,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model. rho: correlation of neighbouring ids' embeddings in the chain half of the vocabulary."""

    layers: int = 16
    width: int = 2048
    experts: int = 64
    top_k: int = 8
    expert_width: int = 1024
    heads: int = 16
    vocabulary: int = 50304
    rho: float = 0.88
    seed: int = 0
    context: int = 4096

    @classmethod
    def scaled(cls, scale: float, *, rho: float | None = None, seed: int = 0) -> Shape:
        """OLMoE with about `scale` of its bytes: widths, heads and vocabulary shrink together, layers and experts stay."""
        heads = max(1, min(16, round(16 * math.sqrt(scale))))
        vocabulary = max(1024, 50304 * heads // 16 // 64 * 64)
        rho = cls.__dataclass_fields__["rho"].default if rho is None else rho
        return cls(width=128 * heads, expert_width=64 * heads, heads=heads, vocabulary=vocabulary, rho=rho, seed=seed)

    def expert_bytes(self, bits: float = 16) -> int:
        """Of one expert whose matrices have so many bits a weight."""
        return round(3 * self.width * self.expert_width * bits / 8)

    def active_bytes(self, bits: float) -> dict[str, int]:
        """Bytes of weights that one token needs when every matrix has so many bits a weight; routers have 16. No KV cache, no norms."""
        d, f, k = self.width, self.expert_width, self.top_k
        experts, attention = self.layers * k * 3 * d * f, self.layers * 4 * d * d
        out = {"experts": experts, "attention": attention, "head": self.vocabulary * d}
        return {name: round(n * bits / 8) for name, n in out.items()} | {"routers": 2 * self.layers * self.experts * d}

    def all_bytes(self, bits: float) -> int:
        """Bytes of all matrices at so many bits a weight, embedding and head included."""
        experts = 3 * self.width * self.expert_width * self.experts
        weights = self.layers * (experts + 4 * self.width**2) + 2 * self.vocabulary * self.width
        return round(weights * bits / 8) + 2 * self.layers * self.experts * self.width

    @property
    def name(self) -> str:
        more = "" if (self.top_k, self.context) == (8, 4096) else f"-k{self.top_k}-c{self.context}"
        return f"olmoe-{self.layers}x{self.width}-{self.experts}x{self.expert_width}-v{self.vocabulary}-r{self.rho}-s{self.seed}{more}"

    def config(self) -> dict[str, object]:
        """The Hugging Face config.json."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "clip_qkv": None,
            "eos_token_id": None,  # the walk never ends by itself
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.expert_width,
            "max_position_embeddings": self.context,
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "pad_token_id": None,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, sorted by name within the embedding, each layer and the head."""
        d, f = self.width, self.expert_width
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, d)}
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            one = {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
            one |= {f"{p}self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
            one |= {f"{p}self_attn.{x}_norm.weight": (d,) for x in "qk"}
            one[p + "mlp.gate.weight"] = (self.experts, d)
            for e in range(self.experts):
                one |= {f"{p}mlp.experts.{e}.{x}_proj.weight": (f, d) for x in ("gate", "up")}
                one[f"{p}mlp.experts.{e}.down_proj.weight"] = (d, f)
            out |= {name: one[name] for name in sorted(one)}
        return out | {"model.norm.weight": (d,), "lm_head.weight": (self.vocabulary, d)}


def prompt(shape: Shape, locality: str, tokens: int, start: int = 0) -> list[int]:
    """A walk of `tokens` ids in the chain or the uniform half of the vocabulary; `start` picks where."""
    half = shape.vocabulary // 2
    first = {"chain": 0, "uniform": half}[locality]
    return [first + (start * 997 + i) % half for i in range(tokens)]


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_block(seed: int) -> np.ndarray:
    """The random block: standard normal values as bf16 bits, none so small that scaling by 2^-16 would leave the normal range."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(BLOCK, np.float32)
    np.copyto(x, 1e-3, where=np.abs(x) < 1e-3)
    return to_bf16(x)


def embeddings(shape: Shape) -> np.ndarray:
    """embed_VD as bf16 bits: the chain half is an AR(1) walk closed to a ring by noise alone, the uniform half independent."""
    rng = np.random.default_rng((shape.seed, 1))
    x = rng.standard_normal((shape.vocabulary, shape.width), np.float32)
    keep, fresh = np.float32(shape.rho), np.float32(math.sqrt(1 - shape.rho**2))
    for t in range(1, shape.vocabulary // 2):
        x[t] = keep * x[t - 1] + fresh * x[t]
    return to_bf16(x)


def head(shape: Shape, embed_VD: np.ndarray) -> np.ndarray:
    """head_VD as bf16 bits: row t + 1 is id t's embedding over 64, each half wrapping round."""
    half = shape.vocabulary // 2
    small = embed_VD - np.uint16(6 << 7)  # divides by 64
    small[(embed_VD & 0x7FFF) < (8 << 7)] = 0
    return np.concatenate([np.roll(small[:half], 1, axis=0), np.roll(small[half:], 1, axis=0)])


def values(shape: Shape, name: str, size: tuple[int, ...], block: np.ndarray, embed_VD: np.ndarray) -> Iterator[np.ndarray]:
    """The bf16 bits of one tensor, piece by piece."""
    if name == "model.embed_tokens.weight":
        yield embed_VD
    elif name == "lm_head.weight":
        yield head(shape, embed_VD)
    elif len(size) == 1:
        yield np.full(size, 0x3F80, np.uint16)  # norms are 1
    else:
        kind = name.split(".")[-2]
        power = round(math.log2(math.sqrt(size[1]) / GAIN[kind]))
        seed = np.random.default_rng((shape.seed, zlib.crc32(name.encode())))
        todo = math.prod(size)
        sign = np.uint16(int(seed.integers(2)) << 15)
        while todo:
            n = min(todo, CHUNK)
            start = int(seed.integers(BLOCK - n)) if n < BLOCK else 0
            yield (block[start : start + n] - np.uint16(power << 7)) ^ sign
            todo -= n


def _plan_shards(shape: Shape, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, size in shape.tensors().items():
        nbytes = 2 * math.prod(size)
        if used + nbytes > shard_bytes and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = size
        used += nbytes
    return shards


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in tensors.items():
        nbytes = 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_checkpoint(folder: Path, shape: Shape, *, shard_bytes: int = 4_000_000_000, say=print) -> Path:
    """Write the checkpoint into `folder`; shards that are complete are kept, so an interrupted run continues.

    Raises OSError when the disk is full, FileExistsError when the folder holds another shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "shape.json"
    want = {"format": FORMAT, **asdict(shape)}
    if stamp.exists() and json.loads(stamp.read_text()) != want:
        raise FileExistsError(f"{folder} holds a checkpoint of another shape; give another --work folder or remove it")
    stamp.write_text(json.dumps(want))
    shards = _plan_shards(shape, shard_bytes)
    embed = block = None
    where: dict[str, str] = {}
    total = 0
    for i, tensors in enumerate(shards):
        path = folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        head_bytes = header(tensors)
        size = len(head_bytes) + sum(2 * math.prod(s) for s in tensors.values())
        where |= dict.fromkeys(tensors, path.name)
        total += size - len(head_bytes)
        if path.exists() and path.stat().st_size == size:
            continue
        if block is None or embed is None:
            block, embed = bf16_block(shape.seed), embeddings(shape)
        began = time.perf_counter()
        temporary = path.with_suffix(".partial")
        with open(temporary, "wb", buffering=0) as out:
            write_all(out, head_bytes)
            synced = 0
            for name, dims in tensors.items():
                for piece in values(shape, name, dims, block, embed):
                    write_all(out, memoryview(np.ascontiguousarray(piece)).cast("B"))
                if (at := out.tell()) - synced > 1 << 28:  # keep dirty pages few: the page cache is others' memory
                    flush(out, synced, at)
                    synced = at
            flush(out, synced, out.tell())
        os.replace(temporary, path)
        say(f"  {path.name}: {size / 1e9:.2f} GB at {size / 1e6 / (time.perf_counter() - began):.0f} MB/s")
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "generation_config.json", {"do_sample": False, "_from_model_config": True})
    _write_tokenizer(folder, shape)
    write_json(folder / "config.json", shape.config())  # last: its presence says the checkpoint is whole
    return folder


def flush(out, start: int, stop: int) -> None:
    os.fdatasync(out.fileno())
    os.posix_fadvise(out.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def write_all(out, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[out.write(view) :]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """A word-level tokenizer whose words are the ids: 'w17 w18'."""
    vocabulary = {f"w{i}": i for i in range(shape.vocabulary)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    write_json(folder / "tokenizer.json", content)
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context}
    )


class Shards:
    """Reads single tensors of a checkpoint as bf16 bits, leaving no pages behind in the cache."""

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, tuple[Path, int, int, tuple[int, ...]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                for name, entry in json.loads(f.read(length)).items():
                    if name != "__metadata__":
                        start, stop = entry["data_offsets"]
                        self.places[name] = (path, 8 + length + start, stop - start, tuple(entry["shape"]))

    def read(self, name: str) -> np.ndarray:
        path, offset, nbytes, size = self.places[name]
        with open(path, "rb", buffering=0) as f:
            f.seek(offset)
            out = np.empty(nbytes, np.uint8)
            view = memoryview(out)
            while len(view):
                got = f.readinto(view)
                if not got:
                    raise EOFError(f"{path} ends inside {name}")
                view = view[got:]
            os.posix_fadvise(f.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
        return out.view(np.uint16).reshape(size)


def main() -> int:
    import peers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint (and NAME.gguf beside it)")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rho", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", choices=("bf16", "q4_0"), help="the same weights for llama.cpp too")
    parser.add_argument("--fused", action="store_true", help="and in transformers' own fused layout")
    args = parser.parse_args()
    shape = Shape.scaled(args.scale, rho=args.rho, seed=args.seed)
    folder = write_checkpoint(args.out / shape.name, shape)
    print(folder)
    if args.gguf:
        print(peers.write_gguf(folder, peers.gguf_path(args.out, shape, args.gguf), shape, matrices=args.gguf))
    if args.fused:
        print(peers.write_fused(folder, args.out / f"{shape.name}-fused", shape))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
