"""How much faster beyond memory when experts have fewer bits, as few as 1 % of perplexity allows on a real model?

    sudo python benchmarks/quality.py --data TEXT.txt                 half of the text chooses, half is held out
    sudo python benchmarks/quality.py --data TEXT.txt --scale 0.02    a quick look (the results then go to the work folder)

First `moestro plan residency --quality` chooses each expert's bits on the embedded real model, by both methods, and measures what that
costs on the text held out. Then OLMoE's shape is packed with the same shares of each width and decodes under kernel limits, on routing
that repeats, in turns with llama.cpp's Q4_0. So the loss is the small model's; that the large one's would be the same is not shown.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import limits
import programs
import shapes
from anatomy import alone
from cells import Cells, parse, parser, say, show, spread
from larger_than_memory import Bench, parse_budget
from programs import Program

BITS = 4.5  # a weight of llama.cpp's, and of moestro's trunk
METHODS = {"edgemoe": "engine.precision.edgemoe", "d2moe": "engine.precision.d2moe"}
PROMISED = 3.0  # times llama.cpp at each limit


def choose(model: Path, method: str, bound: str, data: Path, work: Path) -> dict[str, Any]:
    """The real model's experts of each width, the fewest bits first, and what was measured; or why no width keeps the bound."""
    plan = work / f"{model.name}-{method}.plan.json"
    command = [sys.executable, "-m", "moestro", "plan", "residency", str(model), "--memory", "4GiB", "--output", str(plan)]
    command += ["--quality", bound, "--data", str(data), "--precision", METHODS[method]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    said = shapes.read_json(plan)
    precision = said["precision"]
    counts = [sum(row.count(i) for row in precision["experts_LE"]) for i in range(len(precision["widths"]))]
    measured = {name: precision[name] for name in ("chosen", "held_out")}
    return {"codec": said["codec"], "widths": precision["widths"], "experts": counts, **measured}


def like(chosen: dict[str, Any], shape: shapes.Shape) -> tuple[tuple[int, ...], ...]:
    """experts_LE with the same shares of each width in every layer; which experts does not matter where all are equally popular."""
    total, upto, row = sum(chosen["experts"]), 0, []
    for index, count in enumerate(chosen["experts"]):
        upto += count
        row += [index] * (round(shape.experts * upto / total) - len(row))
    return (tuple(row),) * shape.layers


def prepare(
    checkpoint: Path, shape: shapes.Shape, method: str, chosen: dict[str, Any], budget: int, work: Path, context: int
) -> dict[str, str]:
    """The plan for this budget and the experts packed for it: options of run_moestro.py."""
    from moestro.core.plans.residency import Precision
    from moestro.engine.pack import apply
    from moestro.engine.residency import plan_residency
    from moestro.engine.store import FORMAT
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    opened = Checkpoint.open(checkpoint)
    layout = describe(opened)
    widths = Precision(METHODS[method], tuple(chosen["widths"]), like(chosen, shape))
    plan = plan_residency(
        opened, layout, budget, codec=chosen["codec"], trunk_codec="int4:32", precision=widths, context=context, trunk="native"
    )
    shares = "-".join(f"{name}x{count}" for name, count in zip(chosen["widths"], chosen["experts"], strict=True))
    store = work / f"{checkpoint.name}-{shares}-format{FORMAT}".replace(":", "-").replace("/", "-")
    file = work / f"{store.name}-{budget}.plan.json"
    plan.save(file)
    apply(plan, opened, layout, store)
    return {"plan": str(file), "store": str(store)}


def turns(bench: Bench, ours: Program, theirs: Program, budget: int, repeats: int) -> list[dict[str, Any]]:
    """Both programs under one limit, in turns. The bound of single widths says nothing here and is left out."""
    runs = []
    for start in range(repeats):
        for who in (ours, theirs) if start % 2 == 0 else (theirs, ours):
            run = bench.session(who, budget, "chain", start)
            runs.append(
                {k: v for k, v in run.items() if not k.startswith("bound") and k not in ("missed_per_token", "bytes_over_missed")}
            )
            said = f"{run['decode_rate']:.2f} tokens/s" if "error" not in run else run["error"][-300:]
            say(f"  {budget / 1e9:.2f} GB {who.name}: {said}")
    return runs


def summarise(method: str, chosen: dict[str, Any], budget: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    good = [r for r in runs if "error" not in r]
    rates = {(r["contender"], r["start"]): r["decode_rate"] for r in good}
    starts = [s for name, s in rates if name == "moestro" and ("llama.cpp", s) in rates]
    row: dict[str, Any] = {"method": method, "budget": budget, "runs": len(runs), "failed": len(runs) - len(good)}
    row["peak_within_budget"] = all((r["kernel"]["peak"] or 0) <= budget for r in good)
    row["held_out"] = chosen["held_out"]
    if starts:
        row |= {name: spread(rates[name, s] for s in starts) for name in ("moestro", "llama.cpp")}
        row["times"] = spread(rates["moestro", s] / rates["llama.cpp", s] for s in starts)
        row["kept"] = row["times"]["median"] >= PROMISED
    return row


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--data", type=Path, required=True, help="text for the bound, at least 8,000 tokens")
    p.add_argument("--bound", default="ppl:1%")
    p.add_argument("--methods", default=",".join(METHODS))
    p.add_argument("--budgets", default="50%,25%", help="shares of llama.cpp's file, or sizes")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--decode", type=int, default=64)
    p.add_argument("--read-ahead", type=int, default=128, help="KiB, set for the runs and restored; 0 leaves it as it is")
    p.add_argument("--warm", action="store_true", help="do not drop the page cache before each run (for trying things out)")
    p.add_argument("--no-limit", action="store_true", help="run without a kernel limit; the results say so")
    args = parse(p, argv)
    if not programs.installed("llama.cpp"):
        print("llama.cpp is not installed; pip install llama-cpp-python", file=sys.stderr)
        return 2
    if not args.no_limit:
        try:
            limits.require()
        except limits.Unlimited as error:
            print(f"{error}\n(or run with --no-limit; the results will say that nothing was limited)", file=sys.stderr)
            return 2
    from moestro.build.upcycle.default import ensure_default_model

    real = ensure_default_model()
    shape = shapes.Shape.scaled(args.scale)
    theirs = programs.llama_cpp(shape, args.work, matrices="q4_0", threads=args.threads, say=say, repack=False)
    checkpoint = args.work / shape.name
    probe = max(checkpoint.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    bench = Bench(
        shape, BITS, args.work, probe, not args.no_limit, args.lock, args.threads, args.prompt, args.decode, 60, 900, args.warm,
        args.read_ahead or None,
    )  # fmt: skip
    said = {k: getattr(args, k) for k in ("threads", "repeats", "prompt", "decode", "bound", "read_ahead", "warm")}
    cells = Cells("quality", args, {"shape": shape.name, "data": args.data.name, "limited": bench.limited, **said})
    rows: list[dict[str, Any]] = []
    for method in args.methods.split(","):
        with limits.locked(args.lock):
            chosen = cells.measure(f"{method}: widths", choose, real, method, args.bound, args.data, args.work)
        if "error" in chosen:
            rows.append({"method": method, **chosen})
            print(f"{method}: {chosen['error']}")
            continue
        print(f"{method}: {dict(zip(chosen['widths'], chosen['experts'], strict=True))}, held out {chosen['held_out']}")
        for text in args.budgets.split(","):
            budget = parse_budget(text, shape.all_bytes(BITS))
            context = args.prompt + args.decode + 8
            options = alone(prepare, checkpoint, shape, method, chosen, budget, args.work, context)
            ours = Program("moestro", "run_moestro.py", checkpoint, options)
            runs = cells.measure(f"{method}: {budget}", turns, bench, ours, theirs, budget, args.repeats)
            rows.append(summarise(method, chosen, budget, runs))
            if "times" in rows[-1]:
                print(f"{method} {budget / 1e9:.2f} GB: {show(rows[-1]['times'])} times llama.cpp, promised {PROMISED}")
        cells.write(summary=rows)
    cells.write(summary=rows)
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
