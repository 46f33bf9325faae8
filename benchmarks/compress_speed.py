"""What does compression cost: time against copying the file, memory, GPTQ of a large layer, and what a kill loses?

    sudo python benchmarks/compress_speed.py [--scale 0.02] [--layers 4] [--parts rounding gptq resume]

rounding   OLMoE's shape, 13.8 GB of bf16, to int4:32 with int8:32 elsewhere, by `moestro apply` under a kernel limit of twice the largest
           layer and 500 MB, beside `cp` of the folder; each with an empty page cache, until all is on the disk
gptq       one layer of 64 experts (2048 x 1024) on 4096 drawn tokens, 8 experts each, to int4:64, with all that writing it takes
resume     a smaller OLMoE whose writing is killed in the middle: the same command keeps the complete layers and gives the same bytes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import limits
import numpy as np
import shapes
from cells import Cells, parse, parser, say, spread

PARTS = ("rounding", "gptq", "resume")
ROOM = 500_000_000
TOKENS = 4096


def checkpoint_of(shape: shapes.Shape, work: Path) -> Path:
    folder = work / shape.name
    if not (folder / "config.json").exists():
        shapes.write_checkpoint(folder, shape)
    return folder


def layer_bytes(shape: shapes.Shape) -> int:
    return shape.experts * shape.expert_bytes()


def planned(folder: Path, plan: Path) -> None:
    command = [sys.executable, "-m", "moestro", "plan", "bits", str(folder), "--codec", "int4:32"]
    subprocess.run([*command, "--trunk", "int8:32", "--ends", "int8:32", "-o", str(plan), "-q"], check=True, capture_output=True)


def applying(plan: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "moestro", "apply", str(plan), "-o", str(out), "-q", "--json"]


def rounding(shape: shapes.Shape, work: Path, repeats: int, limited: bool) -> dict[str, Any]:
    """Seconds of copying and of rounding in turn, and the memory that the kernel counted."""
    folder, plan, out = checkpoint_of(shape, work), work / "compress-speed.plan.json", work / "compress-speed-out"
    planned(folder, plan)
    limit, runs = 2 * layer_bytes(shape) + ROOM, []
    for _ in range(repeats):
        shutil.rmtree(out, ignore_errors=True)
        cold = limits.drop_page_cache()
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(folder), str(out)], check=True)
        os.sync()
        copied = time.perf_counter() - began
        shutil.rmtree(out)
        cold = limits.drop_page_cache() and cold
        began = time.perf_counter()
        found = limits.run(applying(plan, out), limit=limit if limited else None, timeout=3600)
        os.sync()
        rounded = time.perf_counter() - began
        if found.returncode:
            return {"error": found.result()["error"]}
        written = sum(file.stat().st_size for file in out.iterdir())
        shutil.rmtree(out)
        runs.append({"copy_s": copied, "round_s": rounded, "cold": cold, "bytes": written, **found.counts()})
        say(f"copy {copied:.1f} s, round {rounded:.1f} s: {rounded / copied:.2f} of it; peak {found.peak_anonymous} of {limit}")
    plan.unlink()
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "limit": limit,
        "limited": limited,
        "times_a_copy": spread(run["round_s"] / run["copy_s"] for run in runs),
        "runs": runs,
    }


def fitting(shape: shapes.Shape, work: Path) -> dict[str, Any]:
    """Seconds of one layer by GPTQ through the executor, and the process's memory."""
    from moestro.compress.bits import blank, encode_experts
    from moestro.compress.encode.inputs import ExpertInputs, Inputs
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import compress
    from moestro.compress.export.coded import CodedJob
    from moestro.core.plans.compression import Slot
    from moestro.kernels import native
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    checkpoint = Checkpoint.open(checkpoint_of(shape, work))
    layout, rng = describe(checkpoint), np.random.default_rng(0)
    mix_DD = rng.standard_normal((shape.width, shape.width)).astype(np.float32) * 0.97 ** np.arange(shape.width)[:, None]
    x_TD = rng.standard_normal((TOKENS, shape.width)).astype(np.float32) @ mix_DD
    x_TD /= np.sqrt(np.square(x_TD).mean(-1, keepdims=True))
    own = [np.sort(rng.choice(TOKENS, TOKENS * shape.top_k // shape.experts, replace=False)) for _ in range(shape.experts)]
    spec, began = layout.facts.layers[0].spec, time.perf_counter()
    layer_DD = Inputs.of(x_TD).moment_CC

    def given(ordinal: int, slot: Slot) -> ExpertInputs:
        return ExpertInputs(x_TD, own[slot.sources[0]], spec, layer_DD)

    plan = encode_experts(blank(checkpoint, layout, "compress.encode.gptq"), layout, "compress.encode.gptq", "int4:64")
    out = work / "compress-speed-gptq"
    compress(
        plan, checkpoint, layout, out, encoder=Encoder(plan, layout.facts, given=given), form=CodedJob, overwrite=True
    )  # fmt: skip
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    say(f"GPTQ of {shape.experts} experts: {seconds:.1f} s")
    return {"experts": shape.experts, "seconds": seconds, "cores": native.cores(), "tokens": TOKENS}


def resuming(shape: shapes.Shape, work: Path) -> dict[str, Any]:
    """Kill the command when half of its layers are complete, run it again, and compare with an undisturbed run."""
    folder, plan, out = checkpoint_of(shape, work), work / "compress-speed.plan.json", work / "compress-speed-out"
    planned(folder, plan)
    shutil.rmtree(out, ignore_errors=True)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(applying(plan, out), check=True, capture_output=True)
    whole, wanted = time.perf_counter() - began, digests(out)
    shutil.rmtree(out)
    child = subprocess.Popen(applying(plan, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and complete(partial) < shape.layers // 2:
        time.sleep(0.005)
    child.kill()
    child.wait()
    kept = complete(partial)
    before = {file.name: file.stat().st_mtime_ns for file in shards(partial)[:kept]}
    began = time.perf_counter()
    subprocess.run(applying(plan, out), check=True, capture_output=True)
    rest = time.perf_counter() - began
    after = sorted(file.stat().st_mtime_ns for file in out.glob("*.safetensors"))
    same = digests(out) == wanted
    shutil.rmtree(out)
    plan.unlink()
    untouched = sum(at in after for at in before.values())
    say(
        f"killed with {kept} files complete, {untouched} of them kept; the rest took {rest:.1f} s of {whole:.1f} s; same bytes: {same}"
    )
    return {"files_complete": kept, "files_kept": untouched, "whole_s": whole, "rest_s": rest, "same_bytes": same}


def shards(partial: Path) -> list[Path]:
    return sorted(partial.glob("shard-*"))


def complete(partial: Path) -> int:
    """Files that the journal of an unfinished run calls complete."""
    try:
        return len(json.loads((partial / "journal.json").read_text(encoding="utf-8"))["sizes"])
    except (OSError, ValueError, KeyError):
        return 0


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def main(argv: Sequence[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--layers", type=int, default=16, help="of the model that is rounded")
    p.add_argument("--no-limit", action="store_true", help="run without a kernel limit; the results say so")
    args = parse(p, argv)
    if not args.no_limit:
        try:
            limits.require()
        except limits.Unlimited as error:
            print(f"{error}\n(or run with --no-limit; the results will say that nothing was limited)", file=sys.stderr)
            return 2
    shape = replace(shapes.Shape.scaled(args.scale), layers=args.layers)
    one = shapes.Shape(
        layers=1, width=shape.width, expert_width=shape.expert_width, heads=shape.heads, vocabulary=1024
    )  # fmt: skip
    small = shapes.Shape.scaled(min(args.scale, 0.02))
    cells = Cells("compress_speed", args, {"shape": shape.name, "repeats": args.repeats, "limited": not args.no_limit})
    with limits.locked(args.lock):
        if "rounding" in args.parts:
            cells.measure("rounding", rounding, shape, args.work, args.repeats, not args.no_limit)
        if "gptq" in args.parts:
            cells.measure("gptq", fitting, one, args.work)
        if "resume" in args.parts:
            cells.measure("resume", resuming, small, args.work)
    cells.write()
    print(cells.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
