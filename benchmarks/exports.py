"""Do other programs compute from moestro's files what moestro computes?

    python benchmarks/exports.py                       every form, four small random models and the embedded one: eight minutes

Of each model a native folder (experts removed and merged), and for each codec tiles, compressed-tensors and GGUF are written and read by
what they are for, on the same tokens. The reference is stock transformers in float32 on the numbers that the files stand for (in bfloat16 where the library makes that of mxfp4):

- native: stock transformers' logits of the folder, against the live model with the same plan; every weight is compared too, in the file's number format;
- packed: moestro's engine on the tiles;
- compressed-tensors: that library decompresses each matrix, number by number as the tiles; then transformers loads the folder with it;
- gguf: llama.cpp, and its tokens of the text. Float files are plain models; coded ones are also held against moestro's engine.

The engine and llama.cpp round activations to 8 bits, each in its own way, so logits differ a little: reported are the share of that
difference in the logits, its KL divergence, and how often both name the same next token. A wrong file would differ by the whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from cells import Cells, default_work

from moestro.models.checkpoint import Checkpoint

MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "head_dim": 32},
    "deepseek_v3": {
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
}
EMBEDDED, EMBEDDED_CODEC = "embedded", "int4:32"
PACKED = ("int8:32", "uint4:32", "int4:32", "int4:64", "mxfp4")
COMPRESSED = ("int8:32", "int4:32", "int4:64", "mxfp4")
GGUF = ("F16", "int8:32", "uint4:32", "int4:32", "mxfp4")
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 49152, "num_hidden_layers": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
TOKENS = 96
FLOAT, ROUNDED = 1e-3, 0.05  # of the logits' root mean square: where nothing is rounded, and where activations or float16 are


class Reader(NamedTuple):
    """What all measurements need. models: folders by name."""

    folder: Path
    models: dict[str, Path]
    ids: list[int]
    text: str


def original(folder: Path, name: str, tokenizer: Path) -> Path:
    """A small random model with the tokenizer's files; DeepSeek's with a layer for the token after the next."""
    from moestro.models.writer import CheckpointWriter, copy_companions
    from moestro.testing.tiny import save_tiny

    out = folder / name
    save_tiny(name, out, **SHAPE, **MODELS[name])
    copy_companions(tokenizer, out)
    if name != "deepseek_v3":
        return out
    bare = Checkpoint.open(out)
    with CheckpointWriter(folder / f"{name}-next", bare.config | {"num_nextn_predict_layers": 1}) as writer:
        for tensor in bare.tensors:
            writer.copy(tensor, bare)
            if tensor.startswith("model.layers.1."):
                writer.copy(tensor.replace(".1.", ".2.", 1), bare, tensor)
        return writer.finish(copy_files_from=bare).path


def coded(read: Reader, name: str, codec: str, *, ends: bool) -> Checkpoint:
    """The model with every matrix rounded to nearest; ends: embedding and head too. What the model does not load is left out."""
    from moestro.compress.bits import BitsWish, plan_bits
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import compress
    from moestro.compress.export.coded import CodedJob
    from moestro.models.families import describe

    out = read.folder / f"{name}-{codec.replace(':', '-')}{'' if ends else '-plain-ends'}"
    if out.exists():
        return Checkpoint.open(out)
    checkpoint = Checkpoint.open(read.models[name])
    layout = describe(checkpoint)
    dropped = ("model.layers.2.*",) if layout.ignored else ()
    wish = BitsWish("compress.encode.rtn", (codec,), trunk=codec, ends=codec if ends else "stored", dropped=dropped)
    plan = plan_bits(checkpoint, layout, wish).plan
    return compress(plan, checkpoint, layout, out, encoder=Encoder(plan, layout.facts), form=CodedJob).checkpoint


def logits(module: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return module(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def reference(folder: Path, ids: list[int], dtype: Any = "float32") -> np.ndarray:
    """Stock transformers on the numbers that a folder of moestro's stands for."""
    from moestro.models.open import open_model

    return logits(open_model(folder, str(dtype).removeprefix("torch.")).module, ids)


def native(read: Reader, name: str) -> dict[str, Any]:
    """A quarter of the experts removed, and of the others one merged from two."""
    import torch
    from transformers import AutoModelForCausalLM

    from moestro.compress.bits import blank
    from moestro.compress.executor import compress
    from moestro.compress.live import compress_live
    from moestro.core.plans.compression import LayerChange, Row, Slot
    from moestro.models.families import describe
    from moestro.models.open import open_model

    checkpoint = Checkpoint.open(read.models[name])
    layout = describe(checkpoint)
    facts = layout.facts.layers[0]
    size = facts.num_experts // facts.router.groups
    kept = [e for e in range(facts.num_experts) if e % size < size - max(1, size // 4)]
    slots = (Slot((kept[0], kept[1]), (0.5, 0.5)), *(Slot((e,)) for e in kept[1:]))
    rows = (Row(0, (kept[0], kept[1]), (0.5, 0.5)), *(Row(i + 1, (e,)) for i, e in enumerate(kept[1:])))
    dropped = ("model.layers.2.*",) if layout.ignored else ()
    plan = blank(checkpoint, layout, "benchmark", dropped=dropped)
    plan = replace(plan, layers=tuple(LayerChange(la.ordinal, slots, rows) for la in plan.layers))
    made = compress(plan, checkpoint, layout, read.folder / f"{name}-native").checkpoint
    live = compress_live(plan, open_model(checkpoint)).module
    stock, said = AutoModelForCausalLM.from_pretrained(made.path, dtype="auto", output_loading_info=True)
    mine, theirs = live.state_dict(), stock.state_dict()
    formats = [
        d
        for d, name_of in ((torch.bfloat16, "BF16"), (torch.float16, "F16"))
        if any(t.dtype == name_of for t in made.tensors.values())
    ]

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        """A file keeps each tensor's number format, where the live model may hold a merged row in more digits."""
        return torch.equal(one, other) or any(torch.equal(one.to(d).to(other.dtype), other) for d in formats)

    same = mine.keys() == theirs.keys() and all(equal(mine[n], theirs[n]) for n in mine)
    faults = sum(len(said[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return {
        "form": "native",
        "model": name,
        "experts": [facts.num_experts, len(kept)],
        "weights_are_equal": same and not faults,
        "companions": companions(made.path, read.models[name]),
        "against_reference": compared(logits(stock.eval(), read.ids), logits(live, read.ids)),
    }


def packed(read: Reader, name: str, codec: str) -> dict[str, Any]:
    """The tiles in moestro's engine."""
    from moestro.engine.engine import Engine

    made = coded(read, name, codec, ends=True)
    with Engine.open(made.path, memory=12 << 30, context=256) as engine:
        mine = np.asarray(next(iter(engine.run([read.ids]))).logits_TV, np.float32)
        said = list(engine.changes)
    return {
        "form": "packed",
        "model": name,
        "codec": codec,
        "changes": said,
        "companions": companions(made.path, read.models[name]),
        "against_reference": compared(mine, reference(made.path, read.ids)),
    }


def compressed(read: Reader, name: str, codec: str) -> dict[str, Any]:
    """compressed-tensors: decompressed by that library, and loaded by transformers."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from moestro.compress.export.compressed_tensors import compressed_tensors
    from moestro.models.codecs.coded import is_coded, read_coded

    source = coded(read, name, codec, ends=False)
    out = read.folder / f"{name}-{codec.replace(':', '-')}-ct"
    made = compressed_tensors(source, out, allow_plain=("lm_head.weight", "kv_b_proj.weight"))
    config = QuantizationConfig.model_validate(made.config["quantization_config"])
    state = {k: v for file in made.files for k, v in load_file(file).items()}
    schemes: list[Any] = list(config.config_groups.values())
    matrices, weights, largest = 0, 0, 0.0
    for tensor in (n for n, ref in source.tensors.items() if is_coded(ref.dtype)):
        module = tensor.removesuffix(".weight")
        scheme = next(s for s in schemes if s.targets == ["Linear"] or module in s.targets)
        local = {k: state[f"{module}.{k}"] for k in ("weight_packed", "weight_scale", "weight_shape") if f"{module}.{k}" in state}
        if local["weight_scale"].dtype == torch.float16:
            local["weight_scale"] = local["weight_scale"].float()  # so that the product is not rounded to float16
        reader: Any = BaseCompressor.get_value_from_registry(scheme.format)
        read_RC = reader.decompress(local, scheme)["weight"].float().numpy()
        largest = max(largest, float(np.abs(read_RC - read_coded(source, tensor).dequantise()).max()))
        matrices, weights = matrices + 1, weights + read_RC.size
    found: dict[str, Any] = {
        "form": "compressed-tensors",
        "model": name,
        "codec": codec,
        "matrices": matrices,
        "weights": weights,
    }
    found |= {"largest_difference": largest, "companions": companions(out, read.models[name])}
    del state
    dtype = torch.bfloat16 if codec == "mxfp4" else torch.float32  # the library makes bfloat16 of mxfp4, whatever is asked for
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()
    return found | {"against_reference": compared(logits(stock, read.ids), reference(source.path, read.ids, dtype))}


def gguf(read: Reader, name: str, codec: str) -> dict[str, Any]:
    """GGUF in llama.cpp, from tiles or, for F16, from a folder of float16."""
    from moestro.compress.export.gguf import gguf as write
    from moestro.engine.engine import Engine

    out = read.folder / f"{name}-{codec.replace(':', '-')}.gguf"
    source = halved(read, name) if codec == "F16" else coded(read, name, codec, ends=True).path
    theirs, tokens, template = llama(write(Checkpoint.open(source), out), read.ids, read.text)
    out.unlink()
    row: dict[str, Any] = {"form": "gguf", "model": name, "codec": codec, "tokenizer_agrees": tokens[: len(read.ids)] == read.ids}
    row |= {"companions": template, "against_reference": compared(theirs, reference(source, read.ids))}
    if codec == "F16":
        return row
    with Engine.open(source, memory=12 << 30, context=256) as engine:
        mine = np.asarray(next(iter(engine.run([read.ids]))).logits_TV, np.float32)
    return row | {"against_engine": compared(theirs, mine)}


def halved(read: Reader, name: str) -> Path:
    """The model in float16."""
    from moestro.models.checkpoint import NUMPY
    from moestro.models.writer import Edits, Made, edit_checkpoint

    source = Checkpoint.open(read.models[name])

    def made(tensor: str) -> Made:
        return Made("F16", source.tensors[tensor].shape, lambda: source.read(tensor).astype(np.float16))

    floats = {n: made(n) for n, ref in source.tensors.items() if NUMPY[ref.dtype] is np.float32}
    out = read.folder / f"{name}-F16"
    return edit_checkpoint(source, out, Edits(replace=floats), config=source.config | {"dtype": "float16"}).path


def llama(file: Path, ids: list[int], text: str) -> tuple[np.ndarray, list[int], bool]:
    """llama.cpp's logits, its own tokens of the text, and whether it found a chat template."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=256, n_batch=256, logits_all=True, verbose=False, n_threads=2)
    model.eval(ids)
    scores = np.array(model.scores[: len(ids)], np.float32)
    found = model.tokenize(text.encode(), add_bos=False, special=False), "tokenizer.chat_template" in model.metadata
    model.close()
    return scores, *found


def companions(folder: Path, source: Path) -> bool:
    """Whether tokenizer, chat template and generation settings are the source's, byte for byte."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    return all((folder / n).read_bytes() == (source / n).read_bytes() for n in names)


def compared(a_TV: np.ndarray, b_TV: np.ndarray) -> dict[str, float]:
    """The relative difference, the mean KL divergence of b from a in nats, and how often both have the same largest logit."""
    from moestro.evaluate.perplexity import log_softmax

    one, other = log_softmax(a_TV), log_softmax(b_TV)
    return {
        "difference": float(np.sqrt(np.square(a_TV - b_TV).mean() / np.square(b_TV).mean())),
        "kl": float((np.exp(one) * (one - other)).sum(-1).mean()),
        "same_token": float((a_TV.argmax(-1) == b_TV.argmax(-1)).mean()),
    }


def good(row: dict[str, Any]) -> bool:
    """Whether a measurement shows the same model."""
    within = FLOAT if row["form"] == "native" else ROUNDED
    exact = row.get("weights_are_equal", True) and row.get("largest_difference", 0) == 0 and row.get("tokenizer_agrees", True)
    return exact and row["companions"] and row["against_reference"]["difference"] < within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS, EMBEDDED], choices=[*MODELS, EMBEDDED])
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--out", type=Path, help="the results, a JSON file that grows; by default among the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    options = parser.parse_args()
    from moestro.build.upcycle.default import ensure_default_model
    from moestro.models.tokenizer import Tokenizer
    from moestro.testing import corpora

    options.scale = 1
    embedded = ensure_default_model()
    text = corpora.text(corpora.domains()[0], 2000)
    ids = Tokenizer.open(embedded).encode(text)[:TOKENS]
    options.work.mkdir(parents=True, exist_ok=True)
    cells = Cells("exports", options, {"shape": SHAPE, "models": MODELS, "embedded": embedded.name, "tokens": TOKENS})
    for name in options.models:
        with TemporaryDirectory(dir=options.work) as temporary:
            folder = Path(temporary)
            read = Reader(folder, {name: embedded if name == EMBEDDED else original(folder, name, embedded)}, ids, text)
            jobs: list[tuple[Any, ...]] = [(native, name)]
            for codec in dict.fromkeys((*PACKED, *COMPRESSED, *GGUF)):
                if name == EMBEDDED and codec != EMBEDDED_CODEC:
                    continue
                jobs += [(packed, name, codec)] if codec in PACKED else []
                jobs += [(compressed, name, codec)] if codec in COMPRESSED else []
                jobs += [(gguf, name, codec)] if codec in GGUF and name != "deepseek_v3" else []
            for job, *what in jobs:
                start = time.monotonic()
                row = cells.measure(" ".join((job.__name__, *what)), job, read, *what)
                print(json.dumps(row | {"good": good(row), "seconds": round(time.monotonic() - start, 1)}), flush=True)
    cells.write()
    bad = [key for key, row in cells.cells.items() if not good(row)]
    print(f"differ: {', '.join(bad)}" if bad else "every reader computes what moestro does")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
