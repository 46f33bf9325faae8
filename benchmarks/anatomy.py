"""Where does each millisecond and each byte of a decode step go?

    python benchmarks/anatomy.py                    7 B parameters in 4 bits
    python benchmarks/anatomy.py --scale 0.02       a quick look (the results then go to the work folder)

An engine decodes with all experts in memory, and another with a budget for half of them. Every call
of the native code is timed; what is left of a step is Python. Plain and timed steps take turns, which tells what the timing itself costs.
The expert kernel's rate by rows gives the roofline.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import programs
import shapes
from cells import Cells, parse, parser, say, spread
from decode import BITS, packed_experts
from limits import locked

from moestro.kernels import native
from moestro.kernels.ffn import grouped_ffn

WARM = 512  # tokens of a prompt that by chance needs every expert
PLACES = {"in memory": 100, "half the experts": 50}  # percent of the experts' bytes


@dataclass
class Clock:
    """Seconds and calls of each native function while it is on."""

    on: bool = False
    spent: dict[str, list[float]] = field(default_factory=dict)


class Timed:
    """The native module, or its reader's queue, every call of which goes through the clock."""

    def __init__(self, target: Any, clock: Clock) -> None:
        self._target, self._clock = target, clock

    def __getattr__(self, name: str) -> Any:
        value, clock = getattr(self._target, name), self._clock
        if isinstance(value, type):
            if name != "Queue":  # handles of weights pass through native calls and stay what they are
                return value
            return lambda *arguments: Timed(value(*arguments), clock)
        if not callable(value):
            return value
        counted = clock.spent.setdefault(name, [0.0, 0])

        def call(*arguments: Any, **named: Any) -> Any:
            if not clock.on:
                return value(*arguments, **named)
            began = time.perf_counter()
            try:
                return value(*arguments, **named)
            finally:
                counted[0] += time.perf_counter() - began
                counted[1] += 1

        setattr(self, name, call)
        return call


@contextmanager
def clocked() -> Iterator[Clock]:
    """Until it ends, all native calls of this process go through the clock."""
    plain, clock = native.extension, Clock()
    through = Timed(plain(), clock)
    native.extension = lambda: through
    try:
        yield clock
    finally:
        native.extension = plain


def steps(program: programs.Program, shape: shapes.Shape, percent: int, args: Any) -> dict[str, Any]:
    """Plain and timed decode steps of one engine, in turns."""
    from moestro.engine.engine import Engine

    length = args.prompt + 2 * args.steps
    budget = round(1.5 * shape.all_bytes(BITS)) + (1 << 30)
    experts = shape.layers * shape.experts * shape.expert_bytes(BITS)
    if percent < 100:
        budget = shape.all_bytes(BITS) - experts + experts * percent // 100 + args.room
    ids = shapes.prompt(shape, "chain", length + 1, 5)
    plain, watched = [], []
    context = max(length, WARM) + 8
    options = {"threads": args.threads, "context": context, **program.options}
    with clocked() as clock, Engine.open(program.model, memory=budget, **options) as engine:
        if percent == 100:
            warm = np.array([shapes.prompt(shape, "uniform", WARM, 3)], np.int64)
            engine.prefill(warm, engine.trunk.start(1, context))
        engine.begin()
        state = engine.trunk.start(1, context)
        engine.prefill(np.array([ids[: args.prompt]], np.int64), state)
        before = counted(engine)
        memory = programs.memory_rate(args.threads)
        stack, halves = getattr(engine.trunk, "stack", None), np.zeros(2)
        for number, token in enumerate(ids[args.prompt : length]):
            clock.on = number % 2 == 1
            halves -= stack.spent if stack and clock.on else (0, 0)
            began = time.perf_counter()
            engine.decode(np.array([[token]], np.int64), state)
            (watched if clock.on else plain).append(time.perf_counter() - began)
            halves += stack.spent if stack and clock.on else (0, 0)
        clock.on = False
        rate = programs.beside(memory, programs.memory_rate(args.threads))
        misses, read, reading = (b - a for a, b in zip(before, counted(engine), strict=True))
    tokens = len(plain) + len(watched)
    calls = {
        name: {"ms": 1e3 * seconds / len(watched), "calls": count / len(watched)}
        for name, (seconds, count) in clock.spent.items()
        if count
    }
    inside = sum(c["ms"] for c in calls.values())
    total = 1e3 * statistics.mean(watched)
    return {
        "step_ms": spread(t * 1e3 for t in plain),
        "timed_step_ms": spread(t * 1e3 for t in watched),
        "climb_ms": dict(zip(("first halves", "second halves"), (1e3 * halves / len(watched)).tolist(), strict=True)),
        "native": dict(sorted(calls.items(), key=lambda item: -item[1]["ms"])),
        "python_ms": total - inside,
        "python_share": (total - inside) / total,
        "memory_rate": rate,
        "misses_per_token": misses / tokens,
        "read_per_token": read / tokens,
        "reading_ms": 1e3 * reading / tokens,
    }


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the job in a process of its own, whose memory is gone when it ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def counted(engine: Any) -> tuple[int, int, float]:
    """Misses, bytes read and seconds in which a read was under way, so far."""
    misses = engine.cache.table.counts(prefill=False).misses
    return misses, engine.reader.bytes_read, engine.reader.seconds_busy


def by_rows(shape: shapes.Shape, args: Any) -> list[dict[str, Any]]:
    """The expert kernel from one row per expert to many: operations and bytes of weights per second."""
    experts = packed_experts(shape, shape.experts)
    k, found = min(shape.top_k, len(experts)), []
    groups = [experts[i : i + k] for i in range(0, len(experts) - k + 1, k)]
    for rows in (int(text) for text in args.rows.split(",")):
        x = np.random.default_rng(1).standard_normal((k * rows, shape.width), np.float32)
        out, order, starts = np.empty_like(x), np.arange(k * rows), np.arange(k + 1) * rows
        seconds, rates = [], []
        for number in range(args.rounds * len(groups) + 1):
            if number % len(groups) == 0:
                rates += programs.memory_rate(args.threads, 1)
            began = time.perf_counter()
            grouped_ffn(x, order, starts, groups[number % len(groups)], activation="silu", out_ND=out, threads=args.threads)
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds[1:])  # the first call warms up
        operations = 6 * k * rows * shape.width * shape.expert_width
        nbytes = sum(e.nbytes for e in experts[:k])
        row = {"rows": rows, "ms": median * 1e3, "operations_per_s": operations / median, "bytes_per_s": nbytes / median}
        found.append({**row, "operations_per_byte": operations / nbytes, "memory_rate": statistics.median(rates)})
        say(
            f"  {rows:4} rows: {median * 1e3:.2f} ms, {operations / median / 1e9:.0f} GOP/s, {nbytes / median / 1e9:.1f} GB/s of weights"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--steps", type=int, default=64, help="plain steps, and as many timed ones")
    p.add_argument("--rounds", type=int, default=5, help="of the kernel, through all experts of a layer")
    p.add_argument("--rows", default="1,2,4,8,16,64,256", help="per expert, of the kernel")
    p.add_argument("--room", type=int, default=256 << 20, help="bytes of the half budget for everything that is no weight")
    args = parse(p, argv)
    if not native.available():
        print("the native code is not installed, so there is nothing to time", file=sys.stderr)
        return 2
    shape = shapes.Shape.scaled(args.scale)
    program = programs.moestro(shape, args.work, bits=4, say=say)
    said = {k: getattr(args, k) for k in ("threads", "prompt", "steps", "room")}
    active = shape.active_bytes(BITS)
    cells = Cells("anatomy", args, {"shape": shape.name, "layers": shape.layers, "active_bytes": active, **said})
    found = {}
    for place, percent in PLACES.items():
        with locked(args.lock):
            found[place] = cells.measure(place, alone, steps, program, shape, percent, args)
        row = found[place]
        print(
            f"{place}: {row['step_ms']['median']:.2f} ms a step, Python {100 * row['python_share']:.1f} %, "
            f"{row['misses_per_token']:.1f} misses"
        )
        for name, call in row["native"].items():
            print(f"  {name:14} {call['ms']:7.3f} ms in {call['calls']:5.0f} calls")
    with locked(args.lock):
        kernel = cells.measure("kernel by rows", by_rows, shape, args)
    cells.write(steps=found, kernel=kernel)
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
