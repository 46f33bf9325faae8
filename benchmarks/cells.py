"""A results file that grows cell by cell: what a stopped benchmark has measured already is kept, and what is left is measured."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import limits
import shapes

HERE = Path(__file__).resolve().parent
PACKAGES = ("moestro", "numpy", "torch", "transformers", "accelerate", "safetensors", "llama-cpp-python", "gguf")


def versions() -> dict[str, str]:
    """Of every program that is measured, and moestro's commit ('+changes' when the tree differs from it outside of benchmarks/)."""
    out = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    git = ["git", "-C", str(HERE)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    status = [*git, "status", "--porcelain", "--", "..", ":!../benchmarks"]
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
    return out | {"commit": (commit or "unknown") + ("+changes" if changed else "")}


def default_work() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "moestro" / "benchmarks"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the arguments that every benchmark of a whole model takes."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--scale", type=float, default=1.0, help="share of OLMoE's bytes (widths and vocabulary shrink)")
    p.add_argument("--work", type=Path, default=default_work(), help="folder for the checkpoints, outside the repository")
    p.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    p.add_argument("--lock", type=Path, help="lock file held while timing")
    p.add_argument("--fresh", action="store_true", help="measure every cell again, also those in the results file")
    p.add_argument("--out", type=Path, help="results file; at full size benchmarks/results/, else the work folder")
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Its arguments; ends the program when the work folder lies inside the repository."""
    args = p.parse_args(argv)
    if args.work.resolve().is_relative_to(HERE.parent):
        p.error(f"--work {args.work} is inside the repository; choose a folder outside it")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def results_path(question: str, args: argparse.Namespace, info: dict[str, Any]) -> Path:
    """Where the answer goes: --out, or <question>_<hardware>_<date>.json among the results, at smaller scales in the work folder."""
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{info['cpu']} {info['cores']}c".lower()).strip("-")
    name = f"{question}_{hardware}_{datetime.date.today().isoformat()}.json"
    if args.out:
        return args.out
    return (
        HERE / "results" / name if args.scale == 1 else args.work / name.replace(f"{question}_", f"{question}-scale{args.scale}_")
    )


class Cells:
    """The results file of one benchmark.

    Cells measured earlier are kept when the file's settings and versions are the same; so a benchmark that was stopped goes on.
    report: what is written besides the cells.
    """

    def __init__(self, question: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
        info = limits.machine(args.work)
        self.path = results_path(question, args, info)
        said = {"question": question, "machine": info, "versions": versions(), "settings": settings}
        self.report: dict[str, Any] = {**said, "date": datetime.date.today().isoformat()}
        self.cells: dict[str, Any] = {}
        if self.path.exists() and not args.fresh:
            before = shapes.read_json(self.path)
            if all(before.get(key) == said[key] for key in ("versions", "settings")):
                self.cells = before["cells"]

    def measure(self, name: str, job: Callable[..., Any], *arguments: Any) -> Any:
        """The cell's value, job(*arguments): measured and written now, unless it was before."""
        if name not in self.cells:
            self.cells[name] = job(*arguments)
            self.write()
        return self.cells[name]

    def write(self, **more: Any) -> None:
        self.report |= more
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shapes.write_json(self.path, {**self.report, "cells": self.cells})


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Median, range and number of the values."""
    found = sorted(values)
    return {"median": statistics.median(found), "low": found[0], "high": found[-1], "runs": len(found)}


def show(found: dict[str, Any], form: str = ".2f", scale: float = 1.0) -> str:
    """'median (low-high)' for a terminal."""
    return f"{found['median'] * scale:{form}} ({found['low'] * scale:{form}}-{found['high'] * scale:{form}})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
