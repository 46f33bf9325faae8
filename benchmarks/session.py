"""One timed decoding session inside a child process: prefill a prompt, decode forced tokens, print one JSON line.

A runner gives `measure` a function that loads the model and returns a Stepper; everything that is counted is counted here, the same
way for every program.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Stepper(Protocol):
    """A loaded model with the state of one sequence."""

    def feed(self, tokens: list[int]) -> int:
        """Run these tokens after those already fed; the most likely next id."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters of the engine's own, since it was loaded; {} if it has none."""
        ...

    def about(self) -> dict[str, Any]:
        """What it chose by itself; {} if nothing."""
        ...


def counters() -> dict[str, float]:
    """What the kernel has counted for this process: bytes from the block layer, faults that waited for the disk, CPU seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    out = {"major_faults": usage.ru_majflt, "user_seconds": usage.ru_utime, "system_seconds": usage.ru_stime}
    try:
        with open("/proc/self/io") as f:
            out["read_bytes"] = int(next(line for line in f if line.startswith("read_bytes")).split()[1])
    except (OSError, StopIteration):
        pass
    return out


def resident() -> dict[str, int]:
    """Resident bytes now: anonymous and file-backed."""
    with open("/proc/self/status") as f:
        table = dict(line.split(":", 1) for line in f if ":" in line)
    return {name: int(table[key].split()[0]) * 1024 for name, key in (("anonymous", "RssAnon"), ("file", "RssFile"))}


def _since(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {k: after[k] - before[k] for k in after}


def measure(load: Callable[[dict[str, Any]], Stepper]) -> int:
    """Run the session that the JSON in argv[1] describes.

    Its fields: model, prompt (ids), forced (ids fed one by one after the prompt), threads, memory (bytes or null),
    seconds (decoding stops early after that long), options (the runner's own).
    """
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # moestro, where it is not installed
    spec = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
    marks = [counters()]
    began = time.perf_counter()
    stepper = load(spec)
    load_seconds = time.perf_counter() - began
    marks.append(counters())
    stats = [stepper.stats()]
    began = time.perf_counter()
    answer = [stepper.feed(spec["prompt"])]
    prefill_seconds = time.perf_counter() - began
    marks.append(counters())
    stats.append(stepper.stats())
    times: list[float] = []
    started = time.perf_counter()
    for token in spec["forced"]:
        began = time.perf_counter()
        answer.append(stepper.feed([token]))
        times.append(time.perf_counter() - began)
        if time.perf_counter() - started > spec["seconds"]:
            break
    marks.append(counters())
    stats.append(stepper.stats())
    phases = dict(zip(("load", "prefill", "decode"), (_since(b, a) for a, b in itertools.pairwise(marks)), strict=True))
    follows = [a == b for a, b in zip(answer, spec["forced"])]
    print(
        json.dumps(
            {
                "load_seconds": load_seconds,
                "prefill_seconds": prefill_seconds,
                "prefill_tokens": len(spec["prompt"]),
                "decode_seconds": times,
                "kernel": phases,
                "resident": resident(),
                "engine": dict(zip(("load", "prefill", "decode"), stats, strict=True)),
                "about": stepper.about(),
                "answer": answer,
                "follows": sum(follows) / max(1, len(follows)),
            }
        ),
        flush=True,
    )
    return 0
