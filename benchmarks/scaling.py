"""How does speed change with memory, and cost with experts, top-k, context and batch?

    sudo python benchmarks/scaling.py                        all axes; memory with llama.cpp beside it
    python benchmarks/scaling.py --axes experts,top_k        some of them
    sudo python benchmarks/scaling.py --scale 0.02           a quick look (the results then go to the work folder)

memory: tokens/s of the 4-bit model under kernel limits, from a cold start, on routing that repeats; with the bound, which is the
longer of the missed bytes over the disk's rate and the active bytes over the memory's. The other axes: milliseconds of one decode step
of a small model in memory (two layers, 4 bits), the points in turns, beside the time that its bytes take at the memory's rate.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import larger_than_memory
import limits
import numpy as np
import picture
import programs
import shapes
from cells import Cells, parse, parser, say, spread

BITS = 4.5
BUDGETS = (20, 30, 40, 50, 65, 80, 100, 115)  # percent of the 4-bit file; the last one holds it and everything else
AXES: dict[str, tuple[int, ...]] = {
    "experts": (16, 32, 64, 128, 256),
    "top_k": (1, 2, 4, 8, 16),
    "context": (8, 512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16),
}
WARM = 512  # tokens of a prompt that by chance needs nearly every expert, so that steps read none from the disk
SMALL = shapes.Shape(layers=2, width=1024, expert_width=512, heads=8, vocabulary=2048, context=8448)


def point(axis: str, value: int, scale: float) -> tuple[shapes.Shape, int, int]:
    """The small model at this point, the tokens before the decoded ones and the sequences."""
    shape = SMALL if scale == 1 else replace(SMALL, width=256, expert_width=64, heads=2)
    if axis in ("experts", "top_k"):
        shape = replace(shape, **{axis: value})
    return shape, value if axis == "context" else 32, value if axis == "batch" else 1


def step(program: programs.Program, shape: shapes.Shape, before: int, batch: int, threads: int, decode: int) -> dict[str, Any]:
    """Decoding steps after `before` tokens of each of `batch` sequences: their time, and the bytes each needs."""
    from moestro.engine.engine import Engine

    context = max(before + decode + 1, WARM)
    starts = [7 * i for i in range(batch)]
    ids_BT = np.array([shapes.prompt(shape, "chain", before + decode + 1, s) for s in starts], np.int64)
    options: dict[str, Any] = {"context": context, "batch": batch, **program.options}
    memory = programs.memory_rate(threads)
    with Engine.open(program.model, memory=4 << 30, threads=threads, trace=True, **options) as engine:
        warm = np.array([shapes.prompt(shape, "uniform", WARM, 3)], np.int64)
        engine.prefill(warm, engine.trunk.start(1, context))
        engine.begin()
        state = engine.trunk.start(batch, context)
        engine.prefill(ids_BT[:, :before], state)
        times = []
        for at in range(before, before + decode):
            began = time.perf_counter()
            engine.decode(ids_BT[:, at : at + 1], state)
            times.append(time.perf_counter() - began)
        last_LTK = engine.trace().experts_LTK[:, -batch:]
        cached = engine.plan.memory.kv_cache * before // context
    distinct = sum(len(np.unique(layer_TK)) for layer_TK in last_LTK)
    active = shape.active_bytes(BITS) | {"experts": distinct * shape.expert_bytes(BITS), "kv_cache": cached}
    rate = programs.beside(memory, programs.memory_rate(threads))
    return {
        "ms": statistics.median(times) * 1e3,
        "bytes": active,
        "bound_ms": sum(active.values()) / rate * 1e3,
        "memory_rate": rate,
    }


def axis_cell(axis: str, args: Any) -> list[dict[str, Any]]:
    """Every point of an axis in turns, `repeats` times."""
    points = [(value, *point(axis, value, args.scale)) for value in AXES[axis]]
    made = {value: programs.moestro(small, args.work, bits=4, say=say) for value, small, _, _ in points}
    found: dict[int, list[dict[str, Any]]] = {value: [] for value in AXES[axis]}
    with limits.locked(args.lock):
        for _ in range(args.repeats):
            for value, small, before, batch in points:
                found[value].append(step(made[value], small, before, batch, args.threads, args.steps))
    rows = []
    for value, runs in found.items():
        row = {"value": value, "ms": spread(r["ms"] for r in runs), "bound_ms": spread(r["bound_ms"] for r in runs)}
        rows.append({**row, "bytes": runs[-1]["bytes"]})
        say(f"  {axis} {value}: {row['ms']['median']:.2f} ms, bound {row['bound_ms']['median']:.2f} ms")
    return rows


def memory_axis(cells: Cells, args: Any) -> list[dict[str, Any]]:
    """Tokens/s of both programs under each limit, one row per limit; each run is a cell."""
    shape = shapes.Shape.scaled(args.scale)
    contenders = [programs.moestro(shape, args.work, bits=4, say=say)]
    if programs.installed("llama.cpp"):
        contenders.append(programs.llama_cpp(shape, args.work, matrices="q4_0", threads=args.threads, say=say, repack=False))
    probe = max((args.work / shape.name).glob("*.safetensors"), key=lambda f: f.stat().st_size)
    bench = larger_than_memory.Bench(
        shape, BITS, args.work, probe, not args.no_limit, args.lock, args.threads, 16, args.steps, 20, 900, args.warm,
        args.read_ahead or None,
    )  # fmt: skip
    rows = []
    for percent in BUDGETS:
        budget = shape.all_bytes(BITS) * percent // 100 + args.room
        row: dict[str, Any] = {"percent": percent, "budget": budget}
        for who in contenders:
            runs = []
            for start in range(args.repeats):
                name = f"memory {percent} % {start} {who.name}"
                runs.append(cells.measure(name, bench.session, who, budget, "chain", start))
            good = [r for r in runs if "error" not in r]
            row[who.name] = spread(r["decode_rate"] for r in good) if good else {"error": runs[0]["error"]}
            if bounds := [r["decode_tokens"] / r["bound_seconds"] for r in good if "bound_seconds" in r]:
                row["bound"] = spread(bounds)
        rows.append(row)
        say(
            f"  memory {percent} %: "
            + ", ".join(f"{k} {v.get('median', float('nan')):.2f}/s" for k, v in row.items() if isinstance(v, dict))
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--axes", default="memory," + ",".join(AXES))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--steps", type=int, default=48, help="decoded tokens of each run")
    p.add_argument("--read-ahead", type=int, default=128, help="KiB, set for the runs and restored; 0 leaves it as it is")
    p.add_argument(
        "--room", type=int, default=0, help="bytes added to every limit; for tiny models, whose runtime is most of them"
    )
    p.add_argument("--warm", action="store_true", help="do not drop the page cache before each run (for trying things out)")
    p.add_argument("--no-limit", action="store_true", help="run without a kernel limit; the results say so")
    args = parse(p, argv)
    axes = args.axes.split(",")
    if unknown := set(axes) - {"memory", *AXES}:
        p.error(f"--axes: {', '.join(sorted(unknown))} is none of memory, {', '.join(AXES)}")
    if "memory" in axes and not args.no_limit:
        try:
            limits.require()
        except limits.Unlimited as error:
            print(f"{error}\n(or leave memory out of --axes, or --no-limit)", file=sys.stderr)
            return 2
    said = {k: getattr(args, k) for k in ("threads", "repeats", "steps", "read_ahead", "warm", "room")}
    cells = Cells("scaling", args, {"shape": shapes.Shape.scaled(args.scale).name, "limited": not args.no_limit, **said})
    found: dict[str, Any] = {}
    for axis in axes:
        found[axis] = memory_axis(cells, args) if axis == "memory" else cells.measure(axis, axis_cell, axis, args)
        cells.write(axes=found)
    picture.plot_scaling(cells.report, cells.path.with_suffix(".png"))
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
