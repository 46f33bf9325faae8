"""Does llama.cpp compute what moestro computes, and does compressed-tensors read what it wrote?

    python benchmarks/gguf_export.py                   three families, every block, with the embedded model's tokenizer: two minutes

A random model of each family is coded, exported and run by both on the same tokens. Both round activations to 8 bits, each in its own way,
so logits differ a little: what is reported is the share of that difference in the logits, its KL divergence, and how often both name
the same next token; beside it the same for the original, uncoded model, so that a wrong file would be seen. Then an OLMoE is written as
compressed-tensors in every form, and that library, which vLLM reads such files with, decompresses it: number by number as the tiles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cells import Cells, default_work

from moestro.models.checkpoint import Checkpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "head_dim": 32},
}
READ_BACK = ("int8:32", "int8:64", "int4:32", "int4:64", "mxfp4")
CODECS = ("int8:32", "int4:32", "uint4:32", "mxfp4")
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 49152, "num_hidden_layers": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
WITHIN = 0.05  # of the logits' root mean square


def coded(folder: Path, family: str, codec: str, *, ends: str) -> Checkpoint:
    """A tiny model of the family with every matrix rounded to nearest; ends: the codec of embedding and head, '' leaves them."""
    from moestro.compress.bits import blank, encode_experts, encode_trunk
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import compress
    from moestro.compress.export.coded import CodedJob
    from moestro.compress.trunk import trunk_matrices
    from moestro.models.families import describe
    from moestro.testing.tiny import save_tiny

    original = folder / family
    if not original.exists():
        save_tiny(family, original, **SHAPE, **FAMILIES[family])
    checkpoint = Checkpoint.open(original)
    layout, rtn = describe(checkpoint), "compress.encode.rtn"
    plan = encode_experts(blank(checkpoint, layout, "benchmark"), layout, rtn, codec)
    plan = encode_trunk(plan, trunk_matrices(checkpoint, layout), inner=(rtn, codec), outer=(rtn, ends) if ends else None)
    out = folder / "-".join((family, codec, ends)).replace(":", "_")
    return compress(plan, checkpoint, layout, out, encoder=Encoder(plan, layout.facts), form=CodedJob, overwrite=True).checkpoint


def run(folder: Path, family: str, codec: str, tokenizer: Path, text: str) -> dict[str, Any]:
    """Code, export, run both."""
    from moestro.compress.export.gguf import gguf
    from moestro.engine.engine import Engine

    original, made = folder / family, coded(folder, family, codec, ends=codec)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for to in (original, made.path):
            shutil.copyfile(tokenizer / name, to / name)
    file = gguf(made, folder / f"{made.path.name}.gguf")
    logits: dict[str, np.ndarray] = {}
    with Engine.open(original, memory=1 << 30, context=128) as engine:
        ids = engine.tokenizer.encode(text)[:96]
        logits["original"] = np.asarray(next(iter(engine.run([ids]))).logits_TV, np.float32)
    with Engine.open(made.path, memory=1 << 30, context=128) as engine:
        logits["moestro"] = np.asarray(next(iter(engine.run([ids]))).logits_TV, np.float32)
    theirs, tokens = llama(file, ids, text)
    return {
        "family": family,
        "codec": codec,
        "tokens": len(ids),
        "tokenizer_agrees": tokens[: len(ids)] == ids,
        "against_moestro": compared(theirs, logits["moestro"]),
        "against_original": compared(theirs, logits["original"]),
    }


def llama(file: Path, ids: list[int], text: str) -> tuple[np.ndarray, list[int]]:
    """llama.cpp's logits, and its own tokens of the text."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=128, n_batch=128, logits_all=True, verbose=False, n_threads=2)
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32), model.tokenize(text.encode(), add_bos=False, special=False)


def compared(a_TV: np.ndarray, b_TV: np.ndarray) -> dict[str, float]:
    """The relative difference, the mean KL divergence of b from a in nats, and how often both have the same largest logit."""
    from moestro.evaluate.perplexity import log_softmax

    one, other = log_softmax(a_TV), log_softmax(b_TV)
    return {
        "difference": float(np.sqrt(np.square(a_TV - b_TV).mean() / np.square(b_TV).mean())),
        "kl": float((np.exp(one) * (one - other)).sum(-1).mean()),
        "same_token": float((a_TV.argmax(-1) == b_TV.argmax(-1)).mean()),
    }


def read_back(folder: Path, codec: str) -> dict[str, Any]:
    """A coded OLMoE as compressed-tensors, decompressed by that library: how many weights, and the largest difference from the tiles'."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    from moestro.compress.export.compressed_tensors import compressed_tensors
    from moestro.models.codecs.coded import is_coded, read_coded

    source = coded(folder, "olmoe", codec, ends="")
    made = compressed_tensors(source, folder / f"ct-{codec.replace(':', '-')}", allow_plain=("lm_head.weight",))
    config = QuantizationConfig.model_validate(made.config["quantization_config"])
    state = {k: v for file in made.files for k, v in load_file(file).items()}
    schemes: list[Any] = list(config.config_groups.values())
    matrices, weights, largest = 0, 0, 0.0
    for name in (n for n, ref in source.tensors.items() if is_coded(ref.dtype)):
        module = name.removesuffix(".weight")
        scheme = next(s for s in schemes if s.targets == ["Linear"] or module in s.targets)
        local = {k.removeprefix(module + "."): v for k, v in state.items() if k.startswith(module + ".")}
        if local["weight_scale"].dtype == torch.float16:
            local["weight_scale"] = local["weight_scale"].float()  # so that the product is not rounded to float16
        reader: Any = BaseCompressor.get_value_from_registry(scheme.format)
        read_RC = reader.decompress(local, scheme)["weight"].float().numpy()
        largest = max(largest, float(np.abs(read_RC - read_coded(source, name).dequantise()).max()))
        matrices, weights = matrices + 1, weights + read_RC.size
    return {"codec": codec, "matrices": matrices, "weights": weights, "largest_difference": largest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with a byte-level BPE tokenizer; by default the embedded model's"
    )
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--out", type=Path, help="the results, a JSON file that grows; by default among the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    options = parser.parse_args()
    from moestro.build.upcycle.default import ensure_default_model
    from moestro.testing import corpora

    options.scale = 1
    tokenizer = options.tokenizer or ensure_default_model()
    text = corpora.text(corpora.domains()[0], 2000)
    options.work.mkdir(parents=True, exist_ok=True)
    cells = Cells("gguf_export", options, {"shape": SHAPE, "tokenizer": tokenizer.name})
    with TemporaryDirectory() as folder:
        for family in options.families:
            for codec in options.codecs:
                start = time.monotonic()
                row = cells.measure(f"llama.cpp {family} {codec}", run, Path(folder), family, codec, tokenizer, text)
                print(json.dumps(row | {"seconds": round(time.monotonic() - start, 1)}), flush=True)
        for codec in READ_BACK:
            print(json.dumps(cells.measure(f"compressed-tensors {codec}", read_back, Path(folder), codec)), flush=True)
    cells.write()
    rows = list(cells.cells.values())
    good = all(row["against_moestro"]["difference"] < WITHIN and row["tokenizer_agrees"] for row in rows if "family" in row)
    exact = all(row["largest_difference"] == 0 for row in rows if "matrices" in row)
    print("llama.cpp computes the same" if good else f"a difference above {WITHIN:.0%} of the logits, or other tokens")
    print("compressed-tensors reads every number back" if exact else "compressed-tensors reads other numbers")
    return 0 if good and exact else 1


if __name__ == "__main__":
    sys.exit(main())
