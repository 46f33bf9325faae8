"""How fast is a checkpoint larger than memory: moestro, transformers + accelerate and llama.cpp under one kernel memory limit.

    sudo python benchmarks/larger_than_memory.py                    the real size: 13.8 GB checkpoint, twice more for the peers' formats
    sudo python benchmarks/larger_than_memory.py --scale 0.05       a quick look

Runs alternate (A B C, A B C, ...), each from a cold page cache, with the disk probed before and after it. Writes
results/larger_than_memory_<hardware>_<date>.json and a picture of it. See README.md for what each number means.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import limits
import peers
import picture
import shapes

HERE = Path(__file__).resolve().parent
SETTINGS = (  # of accelerate: placement, experts implementation, layout; the fastest is measured
    ("mapped", "eager", "fused"),
    ("mapped", "grouped_mm", "fused"),
    ("disk", "eager", "fused"),
    ("disk", "grouped_mm", "fused"),
    ("auto", "eager", "fused"),
    ("auto", "eager", "published"),
)


@dataclass(frozen=True, slots=True)
class Contender:
    """A program under test: the runner that drives it, the files it reads and its options."""

    name: str
    script: str
    model: Path
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is the same for every run."""

    shape: shapes.Shape
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

    def session(self, who: Contender, budget: int, locality: str, start: int, **changes: Any) -> dict[str, Any]:
        """One run: cold cache, probe, child under the limit, probe."""
        prompt, decode = changes.get("prompt", self.prompt), changes.get("decode", self.decode)
        ids = shapes.prompt(self.shape, locality, prompt + decode, start)
        spec = {
            "model": str(who.model),
            "prompt": ids[:prompt],
            "forced": ids[prompt:],
            "threads": self.threads,
            "memory": budget,
            "seconds": self.seconds,
            "options": who.options,
        }
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with limits.locked(self.lock), limits.read_ahead_of(self.work, self.read_ahead) as ahead:
            cold = not self.warm and limits.drop_page_cache()
            before = self.disk()
            argv = [sys.executable, str(HERE / who.script), json.dumps(spec)]
            outcome = limits.run(argv, limit=budget if self.limited else None, timeout=self.timeout, env=env)
            after = self.disk()
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
            "kernel": outcome.counts(),
            **figures(outcome.result(), self.shape, rate),
        }

    def disk(self) -> limits.DiskRate:
        expert = self.shape.expert_bytes
        return limits.disk_rate(
            self.probe, [max(4096, expert // 3), max(4096, expert)], seconds=0.02 if self.warm else 0.25, rounds=2
        )


def figures(result: dict[str, Any], shape: shapes.Shape, disk_rate: float) -> dict[str, Any]:
    """The numbers of one session that are compared. Where the engine counts its misses, also the bound and how near it came.

    missed: experts that decoding needed and memory did not hold, whether read on demand or ahead of it; a wrong guess is none.
    bound_seconds: missed bytes over the disk's rate, the least time in which they could have been read. The disk drifts within
    a run, so its rate is the higher of what the probes saw beside the run and of what the engine's own reads reached in it
    (reader_rate): the ratio never passes 1 because the probes had a slow moment.
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
        missed = misses * shape.expert_bytes
        reader_rate = seen["reader_bytes"] / seen["reader_seconds"] if seen["reader_seconds"] else 0.0
        best_rate = max(disk_rate, reader_rate)
        out |= {
            "reader_rate": reader_rate,
            "hit_rate": hits / max(1, hits + misses),
            "missed_per_token": missed / len(times),
            "bound_seconds": missed / best_rate,
            "bound_ratio": missed / best_rate / total,
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


def tune(bench: Bench, budget: int, folders: dict[str, Path], say) -> tuple[Contender, list[dict[str, Any]]]:
    """Try each of accelerate's settings on a short session; the one that decodes fastest, and what each reached."""
    tried = []
    best: tuple[float, Contender] | None = None
    for placement, experts, layout in SETTINGS:
        options = {"placement": placement, "experts": experts, "resident": budget // 2}
        who = Contender("accelerate", "run_accelerate.py", folders[layout], options)
        run = bench.session(who, budget, "chain", 90, prompt=4, decode=6)
        rate = run.get("decode_rate", 0.0)
        tried.append(
            {"layout": layout, **options, "decode_rate": rate, "error": run.get("error"), "read": run.get("read_per_token")}
        )
        say(f"  accelerate {placement}/{experts}/{layout}: {rate:.3f} tokens/s {(run.get('error') or '')[-200:]}")
        if best is None or rate > best[0]:
            best = (rate, who)
    assert best is not None
    return best[1], tried


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


def verdict(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project promises of moestro, cell by cell."""
    out = []
    for row in rows:
        if row["contender"] != "moestro" or "error" in row:
            continue
        other = next(
            (
                r
                for r in rows
                if r["contender"] == "accelerate" and (r["budget"], r["locality"]) == (row["budget"], row["locality"])
            ),
            {},
        )
        checks: dict[str, Any] = {
            "faster_than_accelerate": other["moestro_over_this"] > 1 if "moestro_over_this" in other else None,
            "at_least_70_percent_of_bound": row["bound_ratio"] >= 0.7 if "bound_ratio" in row else None,
            "bytes_within_5_percent_of_missed": abs(row["bytes_over_missed"] - 1) <= 0.05 if "bytes_over_missed" in row else None,
            "peak_within_budget": row["peak"] <= row["budget"] if row["peak"] is not None else None,
        }
        out.append({"budget": row["budget"], "locality": row["locality"], **checks})
    return out


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


def versions() -> dict[str, str]:
    out = {"python": sys.version.split()[0]}
    for name in ("moestro", "numpy", "torch", "transformers", "accelerate", "safetensors", "llama-cpp-python", "gguf"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "-C", str(HERE), "status", "--porcelain", "--", "..", ":!../benchmarks"],
        capture_output=True,
        text=True,
        check=False,
    )
    return out | {"commit": (commit or "unknown") + ("+changes" if changed.stdout.strip() else "")}


def default_work() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "moestro" / "benchmarks"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scale", type=float, default=1.0, help="share of OLMoE's 13.8 GB (widths and vocabulary shrink)")
    p.add_argument("--work", type=Path, default=default_work(), help="folder for the checkpoints, outside the repository")
    p.add_argument("--budgets", default="50%,25%,4GiB", help="shares of the checkpoint or sizes")
    p.add_argument("--locality", default="chain,uniform", help="chain: about 60 %% of experts recur; uniform: by chance")
    p.add_argument("--contenders", default="moestro,accelerate,llama.cpp")
    p.add_argument("--accelerate", help="PLACEMENT/EXPERTS/LAYOUT instead of trying them all")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    p.add_argument("--decode", type=int, default=64, help="decoded tokens")
    p.add_argument("--seconds", type=float, default=60, help="decoding stops after this long")
    p.add_argument("--timeout", type=float, default=900, help="a run is killed after this long")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--read-ahead", type=int, default=128, help="KiB, set for the runs and restored; 0 leaves it as it is")
    p.add_argument("--lock", type=Path, help="lock file held while timing")
    p.add_argument("--warm", action="store_true", help="do not drop the page cache before each run (for trying things out)")
    p.add_argument("--no-limit", action="store_true", help="run without a kernel limit; the results say so")
    p.add_argument("--out", type=Path, help="results file; at full size benchmarks/results/, else the work folder")
    args = p.parse_args(argv)
    if args.work.resolve().is_relative_to(HERE.parent):
        p.error(f"--work {args.work} is inside the repository; choose a folder outside it")
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

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    names = args.contenders.split(",")
    shape = shapes.Shape.scaled(args.scale)
    say(f"checkpoint {shape.name} in {args.work}")
    folders = {"published": shapes.write_checkpoint(args.work / shape.name, shape, say=say)}
    whole = sum(f.stat().st_size for f in folders["published"].glob("*.safetensors"))
    contenders = []
    if "moestro" in names:
        contenders.append(Contender("moestro", "run_moestro.py", folders["published"]))
    if "accelerate" in names:
        folders["fused"] = peers.write_fused(folders["published"], args.work / f"{shape.name}-fused", shape, say=say)
    if "llama.cpp" in names:
        gguf = peers.write_gguf(folders["published"], args.work / f"{shape.name}.gguf", shape, say=say)
        contenders.append(Contender("llama.cpp", "run_llamacpp.py", gguf))
    bench = Bench(
        shape, args.work, max(folders["published"].glob("*.safetensors"), key=lambda f: f.stat().st_size), limited, args.lock,
        args.threads, args.prompt, args.decode, args.seconds, args.timeout, args.warm,
        args.read_ahead or None,
    )  # fmt: skip
    asked = args.budgets or ("50%,25%,4GiB" if args.scale == 1 else "50%,25%")
    budgets = list(dict.fromkeys(parse_budget(text, whole) for text in asked.split(",")))
    tried: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    today = datetime.date.today().isoformat()
    info = limits.machine(args.work)
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{info['cpu']} {info['cores']}c".lower()).strip("-")
    name = f"larger_than_memory_{hardware}_{today}.json"
    out = args.out or (
        HERE / "results" / name if args.scale == 1 else args.work / name.replace("memory_", f"memory-scale{args.scale}_")
    )
    with limits.locked(args.lock):
        memory_rate = limits.memory_rate(args.threads)
    report: dict[str, Any] = {
        "question": "larger_than_memory",
        "date": today,
        "machine": info,
        "versions": versions(),
        "read_ahead_kib": args.read_ahead or info["read_ahead_kib_before"],
        "kernel_limit": limited,
        "cold_cache": not args.warm,
        "shape": {k: getattr(shape, k) for k in shapes.Shape.__dataclass_fields__},
        "expert_bytes": shape.expert_bytes,
        "checkpoint_bytes": whole,
        "expected_overlap": expected_overlap(bench, folders["published"]),
        "threads": args.threads,
        "prompt_tokens": args.prompt,
        "memory_rate": memory_rate,
    }
    if "accelerate" in names:
        if args.accelerate:
            placement, experts, layout = args.accelerate.split("/")
            options = {"placement": placement, "experts": experts, "resident": min(budgets) // 2}
            chosen = Contender("accelerate", "run_accelerate.py", folders[layout], options)
        else:
            chosen, tried = tune(bench, min(budgets), folders, say)
        contenders.append(chosen)
    order = sorted(contenders, key=lambda c: names.index(c.name))
    for budget in budgets:
        for locality in args.locality.split(","):
            for repeat in range(args.repeats):
                for who in order:
                    run = bench.session(who, budget, locality, repeat)
                    runs.append(run)
                    rate = run.get("decode_rate")
                    got = f"{rate:.3f} tokens/s" if rate else run["error"][-300:]
                    say(
                        f"  {budget / 1e9:.2f} GB {locality} {repeat + 1}/{args.repeats} {who.name}: {got}; disk {run['disk_rate'] / 1e9:.2f} GB/s"
                    )
                    rows = summarise(runs)
                    report |= {
                        "overlap": report["expected_overlap"] | seen_overlap(runs),
                        "disk_rate": statistics.median(r["disk_rate"] for r in runs),
                        "summary": rows,
                        "verdict": verdict(rows),
                    }
                    shapes.write_json(out, {**report, "accelerate_settings_tried": tried, "runs": runs})
    picture.plot(report, out.with_suffix(".png"))
    print(table(report["summary"]))
    for line in report["verdict"]:
        print(json.dumps(line))
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
