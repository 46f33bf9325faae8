"""Does llama.cpp compute what moestro computes, from a GGUF file written by moestro?

    python benchmarks/gguf_export.py                   three families, every block, with the embedded model's tokenizer: two minutes

A random model of each family is coded, exported and run by both on the same tokens. Both round activations to 8 bits, each in its own way,
so logits differ a little: what is reported is the share of that difference in the logits, its KL divergence, and how often both name
the same next token; beside it the same for the original, uncoded model, so that a wrong file would be seen.
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

FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "mixtral": {},
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "head_dim": 32},
}
CODECS = ("int8:32", "int4:32", "uint4:32", "mxfp4")
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "vocab_size": 49152, "num_hidden_layers": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
WITHIN = 0.05  # of the logits' root mean square


def run(folder: Path, family: str, codec: str, tokenizer: Path, text: str) -> dict[str, Any]:
    """Code, export, run both."""
    from moestro.compress.bits import blank, encode_experts, encode_trunk
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import compress
    from moestro.compress.export.coded import CodedJob
    from moestro.compress.export.gguf import gguf
    from moestro.compress.trunk import trunk_matrices
    from moestro.engine.engine import Engine
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe
    from moestro.testing.tiny import save_tiny

    original = folder / family
    if not original.exists():
        save_tiny(family, original, **SHAPE, **FAMILIES[family])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, original / name)
    checkpoint = Checkpoint.open(original)
    layout = describe(checkpoint)
    rtn = ("compress.encode.rtn", codec)
    plan = encode_experts(blank(checkpoint, layout, "benchmark"), layout, rtn[0], codec)
    plan = encode_trunk(plan, trunk_matrices(checkpoint, layout), inner=rtn, outer=rtn)
    name = codec.replace(":", "-")
    made = compress(
        plan, checkpoint, layout, folder / f"{family}-{name}", encoder=Encoder(plan, layout.facts), form=CodedJob
    ).checkpoint
    file = gguf(made, folder / f"{family}-{name}.gguf")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument(
        "--tokenizer", type=Path, help="a folder with a byte-level BPE tokenizer; by default the embedded model's"
    )
    parser.add_argument("--output", type=Path, help="write the results here, as JSON")
    options = parser.parse_args()
    from moestro.build.upcycle.default import ensure_default_model
    from moestro.testing import corpora

    tokenizer = options.tokenizer or ensure_default_model()
    text = corpora.text(corpora.domains()[0], 2000)
    rows = []
    with TemporaryDirectory() as folder:
        for family in options.families:
            for codec in options.codecs:
                start = time.monotonic()
                rows.append(run(Path(folder), family, codec, tokenizer, text))
                print(json.dumps(rows[-1] | {"seconds": round(time.monotonic() - start, 1)}), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"question": "gguf_export", "rows": rows}, indent=1) + "\n", encoding="utf-8")
    good = all(row["against_moestro"]["difference"] < WITHIN and row["tokenizer_agrees"] for row in rows)
    print("llama.cpp computes the same" if good else f"a difference above {WITHIN:.0%} of the logits, or other tokens")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
