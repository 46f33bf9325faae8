"""How fast is a checkpoint larger than memory: moestro, transformers + accelerate and llama.cpp under one kernel memory limit.

    sudo python benchmarks/larger_than_memory.py                    bf16: 13.8 GB checkpoint, twice more for the peers' formats
    sudo python benchmarks/larger_than_memory.py --precision 4bit   the same weights in 3.9 GB, against llama.cpp's Q4_0
    sudo python benchmarks/larger_than_memory.py --scale 0.05       a quick look

Runs alternate (A B C, A B C, ...), each from a cold page cache, with the disk probed before and after it. Writes
results/larger_than_memory_<hardware>_<date>.json and a picture of it. See README.md for what each number means.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import limits
import peers
import picture
import programs
import shapes
from cells import Cells, parse, parser, say
from programs import Program

BITS = {"bf16": 16.0, "4bit": 4.5}  # of a weight; four and a float16 scale per 32
# What the project promises: so many times this program's decoding rate, by routing; and this share of the bound.
PROMISED = {"bf16": ("accelerate", {"chain": 2.0, "uniform": 1.4}), "4bit": ("llama.cpp", {"chain": 2.2, "uniform": 1.5})}
NEAR = 0.8
TRUSTED = 1.1  # an engine that reads this much faster than the probes was not measured against the disk that it had
SETTINGS = (  # of accelerate: placement, experts implementation, layout; the fastest is measured
    ("mapped", "eager", "fused"),
    ("mapped", "grouped_mm", "fused"),
    ("disk", "eager", "fused"),
    ("disk", "grouped_mm", "fused"),
    ("auto", "eager", "fused"),
    ("auto", "eager", "published"),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is the same for every run. bits: of a weight. Prompts and answers in tokens."""

    shape: shapes.Shape
    bits: float
    work: Path
    probe: Path
    limited: bool
    lock: Path | None
    threads: int
    prompt: int
    decode: int
    seconds: float
    timeout: float
    warm: bool
    read_ahead: int | None

    def session(self, who: Program, budget: int, locality: str, start: int) -> dict[str, Any]:
        """One run: cold cache, probes, child under the limit, probes."""
        ids = shapes.prompt(self.shape, locality, self.prompt + self.decode, start)
        turn = {"prompt": ids[: self.prompt], "forced": ids[self.prompt :], "seconds": self.seconds}
        argv = who.command(threads=self.threads, context=len(ids) + 8, memory=budget, turn=turn)
        with limits.locked(self.lock), limits.read_ahead_of(self.work, self.read_ahead) as ahead:
            memory = programs.memory_rate(self.threads)
            cold = not self.warm and limits.drop_page_cache()
            before = self.disk()
            env = programs.environment(self.threads)
            outcome = limits.run(argv, limit=budget if self.limited else None, timeout=self.timeout, env=env)
            after = self.disk()
            memory_rate = programs.beside(memory, programs.memory_rate(self.threads))
        rate = (before.best + after.best) / 2
        return {
            "contender": who.name,
            "options": who.options,
            "budget": budget,
            "locality": locality,
            "start": start,
            "cold": cold,
            "read_ahead_kib": ahead,
            "disk_rate": rate,
            "disk_probes": [before.rates, after.rates],
            "memory_rate": memory_rate,
            "kernel": outcome.counts(),
            **figures(outcome.result(), self.shape, self.bits, rate, memory_rate),
        }

    def disk(self) -> limits.DiskRate:
        expert = self.shape.expert_bytes(self.bits)
        return limits.disk_rate(
            self.probe, [max(4096, expert // 3), max(4096, expert)], seconds=0.02 if self.warm else 0.25, rounds=2
        )


def figures(result: dict[str, Any], shape: shapes.Shape, bits: float, disk_rate: float, memory_rate: float) -> dict[str, Any]:
    """The numbers of one session that are compared. Where the engine counts its misses, also the bound and how near it came.

    missed: experts that decoding needed and memory did not hold, whether read on demand or ahead of it; a wrong guess is none.
    bound_seconds: the longer of missed bytes over the disk's rate, the least time in which they could have been read, and of the
    weights that the tokens need over the memory's rate. The disk drifts within a run, so its rate is the higher of what the probes
    saw beside the run and of what the engine's own reads reached in it (reader_rate). Where the latter decides by far, the bound is
    made of the run itself and tells only how much of the time a read was under way: see `verdict`.
    bytes_over_missed: bytes the kernel read for the process while decoding, over missed experts x expert size.
    """
    if "error" in result:
        return result
    times = result["decode_seconds"]
    total = sum(times)
    read = result["kernel"]["decode"].get("read_bytes")
    out = {
        "decode_tokens": len(times),
        "decode_rate": len(times) / total,
        "median_token_seconds": statistics.median(times),
        "prefill_rate": result["prefill_tokens"] / result["prefill_seconds"],
        "load_seconds": result["load_seconds"],
        "read_per_token": read / len(times) if read is not None else None,
        "prefill_read": result["kernel"]["prefill"].get("read_bytes"),
        "decode_faults_per_token": result["kernel"]["decode"]["major_faults"] / len(times),
        "follows": result["follows"],
        "answer": result["answer"],
        "phases": result["kernel"],
        "engine": result["engine"],
        "about": result["about"],
        "resident": result["resident"],
        "token_seconds": [round(t, 5) for t in times],
    }
    after, before = result["engine"]["decode"], result["engine"]["prefill"]
    if "misses" in after:
        seen = {key: after[key] - before[key] for key in after}
        misses = seen["misses"] + seen["prefetch_used"]
        hits = seen["hits"] - seen["prefetch_used"]
        missed = misses * shape.expert_bytes(bits)
        # Reads under way since before the first token are booked whole when they end, so the sum may exceed the time there was.
        reading = min(seen["reader_seconds"], total)
        reader_rate = seen["reader_bytes"] / reading if reading else 0.0
        disk_seconds = missed / max(disk_rate, reader_rate)
        memory_seconds = len(times) * sum(shape.active_bytes(bits).values()) / memory_rate
        bound = max(disk_seconds, memory_seconds)
        out |= {
            "reader_rate": reader_rate,
            "reader_over_probe": reader_rate / disk_rate,
            "hit_rate": hits / max(1, hits + misses),
            "missed_per_token": missed / len(times),
            "disk_seconds": disk_seconds,
            "memory_seconds": memory_seconds,
            "bound_seconds": bound,
            "bound_ratio": bound / total,
            "bytes_over_missed": read / missed if missed and read is not None else None,
        }
    return out


def expected_overlap(bench: Bench, checkpoint: Path) -> dict[str, float]:
    """Share of a token's experts that its predecessor used too, mean over layers, by locality; estimated from the weights alone.

    The residual stream is little else than the embedding (shapes.py), so routers are applied to the normalised embeddings.
    """
    import numpy as np

    shape, source = bench.shape, shapes.Shards(checkpoint)
    embed = source.read("model.embed_tokens.weight")
    out = {}
    for locality in ("chain", "uniform"):
        x = shapes.from_bf16(embed[shapes.prompt(shape, locality, 65)])
        shares = []
        for layer in range(shape.layers):
            router = shapes.from_bf16(source.read(f"model.layers.{layer}.mlp.gate.weight"))
            chosen = np.argsort(-(x @ router.T), axis=1)[:, : shape.top_k]
            shares += [len(np.intersect1d(a, b)) / shape.top_k for a, b in zip(chosen[1:], chosen[:-1])]
        out[locality] = float(np.mean(shares))
    return out


def seen_overlap(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The same share as moestro's runs saw it, median by locality."""
    seen: dict[str, list[float]] = {}
    for run in runs:
        if "overlap" in run.get("about", {}):
            seen.setdefault(run["locality"], []).append(run["about"]["overlap"])
    return {locality: statistics.median(shares) for locality, shares in seen.items()}


def tune(bench: Bench, budget: int, folders: dict[str, Path]) -> dict[str, Any]:
    """Try each of accelerate's settings on a short session; `best` is the index of the one that decodes fastest."""
    short = replace(bench, prompt=4, decode=6)
    tried = []
    for placement, experts, layout in SETTINGS:
        who = accelerate(folders, placement, experts, layout, budget)
        run = short.session(who, budget, "chain", 90)
        rate = run.get("decode_rate", 0.0)
        said = {"placement": placement, "experts": experts, "layout": layout, "decode_rate": rate}
        tried.append({**said, "error": run.get("error"), "read": run.get("read_per_token")})
        say(f"  accelerate {placement}/{experts}/{layout}: {rate:.3f} tokens/s {(run.get('error') or '')[-200:]}")
    return {"tried": tried, "best": max(range(len(tried)), key=lambda i: tried[i]["decode_rate"])}


def accelerate(folders: dict[str, Path], placement: str, experts: str, layout: str, budget: int) -> Program:
    options = {"placement": placement, "experts": experts, "resident": budget // 2}
    return Program("accelerate", "run_accelerate.py", folders[layout], options)


def parse_budget(text: str, whole: int) -> int:
    """'25%' of the checkpoint, or '4GiB'."""
    if text.endswith("%"):
        return int(whole * float(text[:-1]) / 100)
    found = re.fullmatch(r"([\d.]+)\s*([KMG]i?)B?", text)
    if not found:
        raise SystemExit(f"--budgets: {text!r} is neither like 25% nor like 4GiB")
    power = "KMG".index(found[2][0]) + 1
    return int(float(found[1]) * (1024 if found[2].endswith("i") else 1000) ** power)


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per budget, locality and contender: median and range over repeats, and the paired ratio of moestro to it."""
    rows = []
    cells = dict.fromkeys((r["budget"], r["locality"]) for r in runs)
    for budget, locality in cells:
        cell = [r for r in runs if (r["budget"], r["locality"]) == (budget, locality)]
        ours = {r["start"]: r for r in cell if r["contender"] == "moestro" and "error" not in r}
        for name in dict.fromkeys(r["contender"] for r in cell):
            mine = [r for r in cell if r["contender"] == name]
            good = [r for r in mine if "error" not in r]
            row: dict[str, Any] = {
                "budget": budget,
                "locality": locality,
                "contender": name,
                "runs": len(mine),
                "failed": len(mine) - len(good),
            }
            if not good:
                rows.append({**row, "error": mine[0]["error"]})
                continue
            for key in (
                "decode_rate",
                "prefill_rate",
                "read_per_token",
                "hit_rate",
                "bound_ratio",
                "bytes_over_missed",
                "reader_over_probe",
                "follows",
                "load_seconds",
            ):
                if values := [r[key] for r in good if r.get(key) is not None]:
                    row[key] = statistics.median(values)
                    row[key + "_range"] = [min(values), max(values)]
            peaks = [r["kernel"]["peak"] for r in good if r["kernel"]["peak"] is not None]
            anonymous = [r["kernel"]["peak_anonymous"] for r in good if r["kernel"]["peak_anonymous"] is not None]
            row |= {"peak": max(peaks, default=None), "peak_anonymous": max(anonymous, default=None)}
            ratios = [
                ours[r["start"]]["decode_rate"] / r["decode_rate"] for r in good if r["start"] in ours and name != "moestro"
            ]
            if ratios:
                row |= {"moestro_over_this": statistics.median(ratios), "moestro_over_this_range": [min(ratios), max(ratios)]}
            row["same_answer"] = all(_agree(r, ours[r["start"]]) for r in good if r["start"] in ours) if ours else None
            rows.append(row)
    return rows


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(x == y for x, y in zip(a["answer"], b["answer"]))  # the shorter may have been stopped by the clock


def verdict(rows: Sequence[dict[str, Any]], precision: str) -> list[dict[str, Any]]:
    """What the project promises of moestro, cell by cell: True, False, or None where the measurements cannot tell.

    The share of the bound can tell when no repeat's own reads were much faster than the probes beside it, and none passed 1; a
    share that is too small is so whatever the disk's rate was.
    """
    peer, factors = PROMISED[precision]
    out = []
    for row in rows:
        if row["contender"] != "moestro" or "error" in row:
            continue
        cell = (row["budget"], row["locality"])
        others = [r for r in rows if r["contender"] == peer and (r["budget"], r["locality"]) == cell]
        times = others[0].get("moestro_over_this") if others else None
        least = factors[row["locality"]]
        checks: dict[str, Any] = {
            f"at_least_{least}_times_{peer}": times >= least if times is not None else None,
            f"at_least_{NEAR:.0%}_of_bound": _near(row),
            "bytes_within_5_percent_of_missed": abs(row["bytes_over_missed"] - 1) <= 0.05 if "bytes_over_missed" in row else None,
            "peak_within_budget": row["peak"] <= row["budget"] if row["peak"] is not None else None,
        }
        out.append({"budget": row["budget"], "locality": row["locality"], **checks})
    return out


def _near(row: dict[str, Any]) -> bool | None:
    if "bound_ratio" not in row:
        return None
    if row["bound_ratio"] < NEAR:
        return False
    return True if row["reader_over_probe_range"][1] <= TRUSTED and row["bound_ratio_range"][1] <= 1 else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary for a terminal."""
    head = f"{'budget':>9} {'routing':8} {'program':11} {'decode/s':>9} {'range':>15} {'prefill/s':>9} {'MB/token':>9} {'peak GB':>8} {'hit':>5} {'bound':>6} {'bytes':>6} {'x':>6}"

    def cell(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        value = row.get(key)
        return "-" if value is None else format(value * scale, form)

    lines = [head]
    for r in rows:
        start = f"{r['budget'] / 1e9:8.2f}G {r['locality']:8} {r['contender']:11} "
        if "error" in r:
            lines.append(start + r["error"][-110:].replace("\n", " "))
            continue
        low, high = r["decode_rate_range"]
        lines.append(
            start
            + f"{r['decode_rate']:9.3f} {f'{low:.3f}-{high:.3f}':>15} {r['prefill_rate']:9.2f} {cell(r, 'read_per_token', '.0f', 1e-6):>9} "
            f"{cell(r, 'peak', '.2f', 1e-9):>8} {cell(r, 'hit_rate', '.2f'):>5} {cell(r, 'bound_ratio', '.2f'):>6} "
            f"{cell(r, 'bytes_over_missed', '.3f'):>6} {cell(r, 'moestro_over_this', '.2f'):>6}"
        )
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--precision", choices=tuple(BITS), default="bf16", help="of the weights, in every program")
    p.add_argument("--budgets", help="shares of the checkpoint or sizes; 50%%,25%%,4GiB for bf16, 75%%,50%%,25%% for 4bit")
    p.add_argument("--locality", default="chain,uniform", help="chain: about 60 %% of experts recur; uniform: by chance")
    p.add_argument("--contenders", help="moestro,accelerate,llama.cpp; 4bit without accelerate, which has no such weights")
    p.add_argument("--accelerate", help="PLACEMENT/EXPERTS/LAYOUT instead of trying them all")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    p.add_argument("--decode", type=int, default=64, help="decoded tokens")
    p.add_argument("--seconds", type=float, default=60, help="decoding stops after this long")
    p.add_argument("--timeout", type=float, default=900, help="a run is killed after this long")
    p.add_argument("--read-ahead", type=int, default=128, help="KiB, set for the runs and restored; 0 leaves it as it is")
    p.add_argument("--read-ahead-too", type=int, default=8192, help="KiB at which moestro runs its second budget again; 0: none")
    p.add_argument("--warm", action="store_true", help="do not drop the page cache before each run (for trying things out)")
    p.add_argument("--no-limit", action="store_true", help="run without a kernel limit; the results say so")
    args = parse(p, argv)
    four = args.precision == "4bit"
    args.budgets = args.budgets or ("75%,50%,25%" if four else "50%,25%,4GiB")
    args.contenders = args.contenders or ("moestro,llama.cpp" if four else "moestro,accelerate,llama.cpp")
    if four and "accelerate" in args.contenders:
        p.error("--contenders accelerate has no 4-bit weights; leave it out, or --precision bf16")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    limited = not args.no_limit
    if limited:
        try:
            limits.require()
        except limits.Unlimited as error:
            print(f"{error}\n(or run with --no-limit; the results will say that nothing was limited)", file=sys.stderr)
            return 2
    shape, names, bits = shapes.Shape.scaled(args.scale), args.contenders.split(","), BITS[args.precision]
    say(f"checkpoint {shape.name} in {args.work}")
    folders = {"published": shapes.write_checkpoint(args.work / shape.name, shape, say=say)}
    contenders = {}
    if "moestro" in names:
        contenders["moestro"] = programs.moestro(shape, args.work, bits=round(bits), say=say)
    if "accelerate" in names:
        folders["fused"] = peers.write_fused(folders["published"], args.work / f"{shape.name}-fused", shape, say=say)
    if "llama.cpp" in names:
        matrices = "bf16" if bits == 16 else "q4_0"
        contenders["llama.cpp"] = programs.llama_cpp(
            shape, args.work, matrices=matrices, threads=args.threads, say=say, repack=False
        )
    bench = Bench(
        shape, bits, args.work, max(folders["published"].glob("*.safetensors"), key=lambda f: f.stat().st_size), limited, args.lock,
        args.threads, args.prompt, args.decode, args.seconds, args.timeout, args.warm, args.read_ahead or None,
    )  # fmt: skip
    whole = shape.all_bytes(bits)
    budgets = list(dict.fromkeys(parse_budget(text, whole) for text in args.budgets.split(",")))
    settings = {k: getattr(args, k) for k in ("precision", "threads", "prompt", "decode", "seconds", "read_ahead", "warm")}
    question = "larger_than_memory" if bits == 16 else f"larger_than_memory_{args.precision}"
    cells = Cells(question, args, {"shape": shape.name, "limited": limited, **settings})
    cells.report |= {
        "read_ahead_kib": args.read_ahead or cells.report["machine"]["read_ahead_kib_before"],
        "kernel_limit": limited,
        "expert_bytes": shape.expert_bytes(bits),
        "active_bytes": shape.active_bytes(bits),
        "checkpoint_bytes": whole,
        "precision": args.precision,
        "threads": args.threads,
        "expected_overlap": expected_overlap(bench, folders["published"]),
    }
    if "accelerate" in names:
        if args.accelerate:
            setting = args.accelerate.split("/")
        else:
            found = cells.measure("accelerate's settings", tune, bench, min(budgets), folders)
            setting = SETTINGS[found["best"]]
        contenders["accelerate"] = accelerate(folders, *setting, min(budgets))
    order = [contenders[name] for name in names]
    runs: list[dict[str, Any]] = []

    def add(bench: Bench, who: Program, budget: int, locality: str, repeat: int) -> None:
        name = f"{budget}/{locality}/{repeat}/{who.name}"
        run = cells.measure(name, bench.session, who, budget, locality, repeat)
        runs.append(run)
        rate = run.get("decode_rate")
        say(f"  {name}: {f'{rate:.3f} tokens/s' if rate else run['error'][-300:]}; disk {run['disk_rate'] / 1e9:.2f} GB/s")
        rows = summarise(runs)
        cells.write(
            overlap=cells.report["expected_overlap"] | seen_overlap(runs),
            disk_rate=statistics.median(r["disk_rate"] for r in runs),
            memory_rate=statistics.median(r["memory_rate"] for r in runs),
            summary=rows,
            verdict=verdict(rows, args.precision),
        )

    for budget in budgets:
        for locality in args.locality.split(","):
            for repeat in range(args.repeats):
                for who in order:
                    add(bench, who, budget, locality, repeat)
    if "moestro" in contenders and args.read_ahead_too and args.read_ahead:
        other = replace(contenders["moestro"], name=f"moestro at {args.read_ahead_too} KiB")
        for repeat in range(args.repeats):
            add(replace(bench, read_ahead=args.read_ahead_too), other, budgets[min(1, len(budgets) - 1)], "chain", repeat)
    picture.plot(cells.report, cells.path.with_suffix(".png"))
    print(table(cells.report["summary"]))
    for line in cells.report["verdict"]:
        print(json.dumps(line))
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
