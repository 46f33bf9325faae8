"""How fast does a model in memory read a prompt: moestro in four bits, llama.cpp in Q4_0 and Q4_K_M, transformers in bf16.

    python benchmarks/prefill.py                    7 B parameters: 45 GB of files to make once, 20 GB of memory
    python benchmarks/prefill.py --peers q4_0       one peer, 18 GB of files
    python benchmarks/prefill.py --scale 0.02       a quick look (the results then go to the work folder)

moestro and one peer at a time stay loaded and take turns on the same prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import programs
import shapes
from cells import Cells, parse, parser, say, show, spread
from limits import locked
from programs import Program, Running

BITS = 4.5  # four and a float16 scale per 32
PEERS = ("q4_0", "q4_k_m", "transformers")
PROMISED = 1.3  # times the best llama.cpp; twice the best of all where the processor has AMX
PROMISED_AMX = 2.0


def operations(shape: shapes.Shape) -> int:
    """Multiplications and additions of the weights of one token, without attention's own and the head (needed once per prompt)."""
    return 2 * shape.layers * (3 * shape.top_k * shape.width * shape.expert_width + 4 * shape.width**2)


def pairs(ours: Program, peer: Program, shape: shapes.Shape, args: Any) -> list[dict[str, Any]]:
    """Both programs read the same prompts in turns, one prompt before to warm up."""
    lengths = [int(text) for text in args.lengths.split(",")]
    budget = round(1.5 * shape.all_bytes(BITS)) + (2 << 30)
    runs = []
    with (
        Running(peer, threads=args.threads, context=max(lengths) + 8) as b,
        Running(ours, threads=args.threads, context=max(lengths) + 8, memory=budget) as a,
    ):
        for who in (a, b):
            who.turn(shapes.prompt(shape, "uniform", max(lengths), 3))
        for length in lengths:
            for pair in range(args.pairs):
                ids = shapes.prompt(shape, "chain" if pair % 2 else "uniform", length + 1, 11 + pair)
                for who in (a, b) if pair % 2 == 0 else (b, a):
                    result = who.turn(ids[:-1])
                    found = {"peer": peer.name, "program": who.program.name, "tokens": length, "pair": pair}
                    found |= {"tokens_per_s": length / result["prefill_seconds"], "follows": result["answer"][0] == ids[-1]}
                    runs.append(found)
                    say(f"  {who.program.name} {length} tokens: {found['tokens_per_s']:.1f}/s")
    return runs


def summarise(runs: list[dict[str, Any]], shape: shapes.Shape, amx: bool) -> dict[str, Any]:
    """Per length and peer: both rates and their ratio, paired; then the promise, against the slowest ratio there is."""
    rows = []
    for peer in dict.fromkeys(r["peer"] for r in runs):
        for length in dict.fromkeys(r["tokens"] for r in runs):
            cell = [r for r in runs if (r["peer"], r["tokens"]) == (peer, length)]
            mine, theirs = ([r for r in cell if r["program"] == name] for name in ("moestro", peer))
            both = zip(sorted(mine, key=lambda r: r["pair"]), sorted(theirs, key=lambda r: r["pair"]), strict=True)
            row: dict[str, Any] = {"peer": peer, "tokens": length}
            row["moestro"] = spread(r["tokens_per_s"] for r in mine)
            row["theirs"] = spread(r["tokens_per_s"] for r in theirs)
            row["times"] = spread(a["tokens_per_s"] / b["tokens_per_s"] for a, b in both)
            row["operations_per_s"] = row["moestro"]["median"] * operations(shape)
            row["follows"] = statistics.mean(r["follows"] for r in cell)
            rows.append(row)
    longest = max(r["tokens"] for r in rows)
    judged = [r for r in rows if r["tokens"] == longest and (amx or r["peer"] != "transformers bf16")]
    promised = PROMISED_AMX if amx else PROMISED
    promise = {}
    if judged:
        least = min(judged, key=lambda r: r["times"]["median"])
        reached = least["times"]["median"]
        promise = {"promised": promised, "reached": reached, "against": least["peer"], "kept": reached >= promised}
    return {"rows": rows, "promise": promise}


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'peer':18} {'prompt':>7} {'moestro/s':>20} {'peer/s':>20} {'times':>18} {'TOP/s':>6} {'follows':>8}"]
    for r in summary["rows"]:
        parts = (show(r["moestro"], ".1f"), show(r["theirs"], ".1f"), show(r["times"]))
        line = f"{r['peer']:18} {r['tokens']:7} {parts[0]:>20} {parts[1]:>20} {parts[2]:>18}"
        lines.append(f"{line} {r['operations_per_s'] / 1e12:6.2f} {r['follows']:8.2f}")
    if promise := summary["promise"]:
        kept = "kept" if promise["kept"] else "NOT kept"
        lines.append(f"{promise['reached']:.2f} times {promise['against']}, promised {promise['promised']:.2f}: {kept}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--peers", default=",".join(PEERS))
    p.add_argument("--pairs", type=int, default=5, help="pairs of turns for each peer and length")
    p.add_argument("--lengths", default="128,512", help="tokens of the prompts")
    args = parse(p, argv)
    shape = shapes.Shape.scaled(args.scale)
    ours = programs.moestro(shape, args.work, bits=4, say=say)
    settings = {"shape": shape.name, **{k: getattr(args, k) for k in ("threads", "pairs", "lengths")}}
    cells = Cells("prefill", args, settings)
    cells.report |= {"operations_per_token": operations(shape), "top_k_share": shape.top_k / shape.experts}
    runs: list[dict[str, Any]] = []
    for name in args.peers.split(","):
        if not programs.installed("transformers" if name == "transformers" else "llama.cpp"):
            say(f"  {name} is left out: its program is not installed")
            cells.report.setdefault("left_out", []).append(name)
            continue
        if name == "transformers":
            peer = programs.transformers(shape, args.work, say=say)
        else:
            peer = programs.llama_cpp(
                shape, args.work, matrices=name, threads=args.threads, say=say, name=f"llama.cpp {name.upper()}"
            )
        with locked(args.lock):
            runs += cells.measure(peer.name, pairs, ours, peer, shape, args)
        amx = "amx_int8" in cells.report["machine"]["isa"]
        cells.write(summary=summarise(runs, shape, amx))
    print(table(cells.report["summary"]) if runs else "nothing was measured")
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
