"""How fast does a model in memory decode: moestro and llama.cpp, four bits, the same numbers, and how near the memory's rate.

    python benchmarks/decode.py                     7 B parameters: 14 GB of files to make once, 10 GB of memory
    python benchmarks/decode.py --scale 0.02        a quick look (the results then go to the work folder)

Both programs stay loaded and take turns on the same tokens; the memory's rate is probed between steps, so that both see the same machine. `busy` is the
same with one computing process beside them. The expert kernel alone runs one token through the chosen experts of one layer.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import programs
import shapes
from cells import Cells, parse, parser, say, show, spread
from limits import locked
from programs import Running

from moestro.kernels.bandwidth import one_pass
from moestro.kernels.ffn import ExpertView, grouped_ffn
from moestro.kernels.packed import Packed, pack, part_sizes
from moestro.kernels.quantise import encode_int4
from moestro.kernels.reader import aligned

BITS = 4.5  # four and a float16 scale per 32
LOCALITIES = ("chain", "uniform")
PROMISES = {"times_llama.cpp": 1.4, "share_of_bound": 0.85, "kernel_share": 0.93, "kept_when_busy": 0.60}


def turn(who: Running, ids: list[int], prompt: int) -> dict[str, Any]:
    """One sequence decoded, with the memory's rate between its steps."""
    result = who.turn(ids[:prompt], ids[prompt:], probes=True)
    rate = statistics.median(result["memory_rates"])
    seconds = result["decode_seconds"]
    cpu = result["kernel"]["decode"]
    return {
        "program": who.program.name,
        "tokens_per_s": len(seconds) / sum(seconds),
        "median_ms": statistics.median(seconds) * 1e3,
        "memory_rate": rate,
        "cpu_per_s": (cpu["user_seconds"] + cpu["system_seconds"]) / sum(seconds),
        "follows": result["follows"],
        "answer": result["answer"],
        "misses": _misses(result),
    }


def _misses(result: dict[str, Any]) -> int:
    """Experts that were read while decoding: none, or the model was not in memory."""
    engine = result["engine"]
    return engine["decode"].get("misses", 0) - engine["prefill"].get("misses", 0)


def warm(who: Running, shape: shapes.Shape, longest: int) -> None:
    """Reads every expert once: a prompt so long that by chance each is chosen (`misses` tells)."""
    who.turn(shapes.prompt(shape, "uniform", longest, 3))


def one_round(number: int, contenders: list[programs.Program], shape: shapes.Shape, args: Any) -> list[dict[str, Any]]:
    """Both programs started anew, then pairs of turns: alone, and beside a busy process."""
    longest = max(args.prompt + args.decode, min(512, shape.context // 2))
    budget = round(1.5 * shape.all_bytes(BITS)) + (1 << 30)
    runs = []
    with (
        Running(contenders[0], threads=args.threads, context=longest + 8, memory=budget) as ours,
        Running(contenders[1], threads=args.threads, context=longest + 8) as theirs,
    ):
        for who in (ours, theirs):
            warm(who, shape, longest)
        for pair in range(args.pairs):
            order = (ours, theirs) if (number + pair) % 2 == 0 else (theirs, ours)
            locality = LOCALITIES[pair % 2]
            ids = shapes.prompt(shape, locality, args.prompt + args.decode, number * args.pairs + pair)
            said = {"round": number, "pair": pair, "locality": locality}
            for who in order:
                runs.append({**said, "busy": False, **turn(who, ids, args.prompt)})
                with programs.busy_process():
                    time.sleep(0.2)
                    runs.append({**said, "busy": True, **turn(who, ids, args.prompt)})
            alone = [r for r in runs[-4:] if not r["busy"]]
            say(
                f"  round {number + 1} pair {pair + 1}: "
                + ", ".join(f"{r['program']} {r['tokens_per_s']:.2f}/s at {r['memory_rate'] / 1e9:.1f} GB/s" for r in alone)
            )
    return runs


def packed_experts(shape: shapes.Shape, count: int) -> list[ExpertView]:
    """So many experts of random weights, one behind the other in one buffer, as in the engine's slots."""
    rng = np.random.default_rng(0)
    d, f = shape.width, shape.expert_width
    sizes = [sum(part_sizes(rows, cols, "int4", 32)) for rows, cols in ((f, d), (f, d), (d, f))]
    pool = aligned(count * sum(sizes))
    at = 0

    def matrix(rows: int, cols: int) -> Packed:
        nonlocal at
        made = pack(encode_int4(rng.standard_normal((rows, cols), np.float32), 32, scale_dtype="float16"))
        place = pool[at : at + made.nbytes]
        place[:] = made.parts[0]
        at += made.nbytes
        return Packed((place,), made.format, made.group, rows, cols)

    return [ExpertView(matrix(f, d), matrix(f, d), matrix(d, f)) for _ in range(count)]


def kernel_alone(shape: shapes.Shape, threads: int, rounds: int) -> list[dict[str, float]]:
    """One token through the chosen experts of a layer, in turns with reading as many bytes; both go on through more than the caches hold."""
    experts = packed_experts(shape, shape.experts)
    k = min(shape.top_k, len(experts))
    x = np.random.default_rng(1).standard_normal((1, shape.width), np.float32)
    out, order, starts = np.empty((k, shape.width), np.float32), np.zeros(k, np.int64), np.arange(k + 1)
    groups = [experts[i : i + k] for i in range(0, len(experts) - k + 1, k)]
    nbytes, found = sum(e.nbytes for e in experts[:k]), []
    other = aligned(len(groups) * nbytes)
    other[::2048] = 1
    for number in range(rounds + 1):
        pairs = []
        for _ in range(8):
            for i, chosen in enumerate(groups):
                rate = one_pass(other[i * nbytes : (i + 1) * nbytes], threads)
                began = time.perf_counter()
                grouped_ffn(x, order, starts, chosen, activation="silu", out_ND=out, threads=threads)
                pairs.append((time.perf_counter() - began, rate))
        if number:  # the first round warms up
            seconds, rate = (statistics.median(column) for column in zip(*pairs, strict=True))
            found.append({"ms": seconds * 1e3, "bytes": nbytes, "rate": nbytes / seconds, "memory_rate": rate})
    return found


def summarise(runs: list[dict[str, Any]], kernel: list[dict[str, float]], active: int) -> dict[str, Any]:
    """Medians and ranges; ratios are of the same pair of turns."""
    names = list(dict.fromkeys(r["program"] for r in runs))
    out: dict[str, Any] = {"programs": {}, "kernel_share": spread(r["rate"] / r["memory_rate"] for r in kernel)}
    rates = {(r["program"], r["round"], r["pair"], r["busy"]): r["tokens_per_s"] for r in runs}
    keys = list(dict.fromkeys((r["round"], r["pair"]) for r in runs))
    for name in names:
        alone = [r for r in runs if r["program"] == name and not r["busy"]]
        out["programs"][name] = {
            "tokens_per_s": spread(r["tokens_per_s"] for r in alone),
            "share_of_bound": spread(r["tokens_per_s"] * active / r["memory_rate"] for r in alone),
            "busy_tokens_per_s": spread(rates[name, *key, True] for key in keys),
            "kept_when_busy": spread(rates[name, *key, True] / rates[name, *key, False] for key in keys),
            "cpu_per_s": spread(r["cpu_per_s"] for r in alone),
            "follows": min(r["follows"] for r in runs if r["program"] == name),
            "misses": sum(r["misses"] for r in runs if r["program"] == name),
        }
    ours, theirs = names if names[0] == "moestro" else names[::-1]
    for busy, key in ((False, "times_llama.cpp"), (True, "times_llama.cpp_when_busy")):
        out[key] = spread(rates[ours, *pair, busy] / rates[theirs, *pair, busy] for pair in keys)
    mine = out["programs"][ours]
    reached = {"share_of_bound": mine["share_of_bound"], "kept_when_busy": mine["kept_when_busy"]}
    reached |= {key: out[key] for key in ("times_llama.cpp", "kernel_share")}
    out["promises"] = {
        key: {"promised": least, "reached": reached[key]["median"], "kept": reached[key]["median"] >= least}
        for key, least in PROMISES.items()
    }
    return out


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--rounds", type=int, default=3, help="times that both programs are started anew")
    p.add_argument("--pairs", type=int, default=4, help="pairs of turns in each round")
    p.add_argument("--prompt", type=int, default=16)
    p.add_argument("--decode", type=int, default=96)
    args = parse(p, argv)
    if not programs.installed("llama.cpp"):
        print("llama.cpp is not installed; pip install llama-cpp-python", file=sys.stderr)
        return 2
    shape = shapes.Shape.scaled(args.scale)
    contenders = [
        programs.moestro(shape, args.work, bits=4, say=say, trace=False),
        programs.llama_cpp(shape, args.work, matrices="q4_0", threads=args.threads, say=say),
    ]
    active = shape.active_bytes(BITS)
    settings = {
        "shape": shape.name,
        "active_bytes": active,
        **{k: getattr(args, k) for k in ("threads", "pairs", "prompt", "decode")},
    }
    cells = Cells("decode", args, settings)
    with locked(args.lock):
        kernel = cells.measure("kernel", kernel_alone, shape, args.threads, max(5, args.rounds * args.pairs))
    runs: list[dict[str, Any]] = []
    for number in range(args.rounds):
        with locked(args.lock):
            runs += cells.measure(f"round {number}", one_round, number, contenders, shape, args)
        cells.write(summary=summarise(runs, kernel, sum(active.values())))
    print(table(cells.report["summary"]))
    print(cells.path)
    return 0


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'program':16} {'tokens/s':>22} {'of the bound':>20} {'kept when busy':>20} {'follows':>8}"]
    for name, row in summary["programs"].items():
        parts = (show(row["tokens_per_s"], ".1f"), show(row["share_of_bound"]), show(row["kept_when_busy"]))
        lines.append(f"{name:16} {parts[0]:>22} {parts[1]:>20} {parts[2]:>20} {row['follows']:8.2f}")
    lines.append(f"expert kernel alone: {show(summary['kernel_share'])} of the memory's rate")
    for key, promise in summary["promises"].items():
        lines.append(
            f"{key:18} {promise['reached']:.2f}, promised {promise['promised']:.2f}: {'kept' if promise['kept'] else 'NOT kept'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
