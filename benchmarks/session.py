"""Timed turns inside a child process: read a prompt, decode forced tokens, print one JSON line per turn.

A runner gives `main` a function that loads the model and returns a Stepper; everything that is counted is counted here, the same
way for every program. The specification is the JSON in argv[1], with the fields model, threads, memory (bytes or null), context
(tokens), options (the runner's own) and `turn`: {prompt: ids, forced: ids fed one by one after it, seconds: decoding stops early after
that long, probes: whether the memory's rate is probed between steps}. Without `turn` the child stays and takes turns from its standard input, one JSON object a line.
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

EVERY, PROBED = 3, 32 << 20  # steps between two probes; bytes of one


class Stepper(Protocol):
    """A loaded model with the state of one sequence."""

    def start(self) -> None:
        """Begin a new sequence; what was fed before is forgotten."""
        ...

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


class Probe:
    """Reads as much memory as fits no cache, as a decode step does, between two of them. rates: bytes per second. spent: CPU seconds."""

    def __init__(self, threads: int) -> None:
        from moestro.kernels.reader import aligned

        self.threads, self.rates, self.spent, self._at = threads, [], {}, 0
        self._buffer = aligned(8 * PROBED)
        self._buffer[::2048] = 1

    def take(self) -> None:
        from moestro.kernels.bandwidth import one_pass

        before = counters()
        self.rates.append(one_pass(self._buffer[self._at : self._at + PROBED], self.threads))
        self._at = (self._at + PROBED) % len(self._buffer)
        for name, value in _since(counters(), before).items():
            self.spent[name] = self.spent.get(name, 0.0) + value


def _since(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {k: after[k] - before[k] for k in after}


def play(stepper: Stepper, turn: dict[str, Any]) -> dict[str, Any]:
    """One sequence from its start: times, what the kernel and the engine counted in each phase, and the answers."""
    stepper.start()
    marks, stats = [counters()], [stepper.stats()]
    began = time.perf_counter()
    answer = [stepper.feed(turn["prompt"])]
    prefill_seconds = time.perf_counter() - began
    marks.append(counters())
    stats.append(stepper.stats())
    times: list[float] = []
    probe = Probe(len(os.sched_getaffinity(0))) if turn.get("probes") else None
    started = time.perf_counter()
    for number, token in enumerate(turn["forced"]):
        if probe and number % EVERY == 0:
            probe.take()
        began = time.perf_counter()
        answer.append(stepper.feed([token]))
        times.append(time.perf_counter() - began)
        if time.perf_counter() - started > turn["seconds"]:
            break
    marks.append(counters())
    stats.append(stepper.stats())
    phases = dict(zip(("prefill", "decode"), (_since(b, a) for a, b in itertools.pairwise(marks)), strict=True))
    if probe:
        phases["decode"] = {k: v - probe.spent.get(k, 0.0) for k, v in phases["decode"].items()}
    follows = [a == b for a, b in zip(answer, turn["forced"])]
    return {
        "prefill_seconds": prefill_seconds,
        "prefill_tokens": len(turn["prompt"]),
        "decode_seconds": times,
        "kernel": phases,
        "memory_rates": probe.rates if probe else [],
        "resident": resident(),
        "engine": dict(zip(("load", "prefill", "decode"), stats, strict=True)),
        "answer": answer,
        "follows": sum(follows) / max(1, len(follows)),
    }


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def main(load: Callable[[dict[str, Any]], Stepper]) -> int:
    """Load the model as argv[1] says and take its one turn, or those that come on standard input."""
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # moestro, where it is not installed
    spec = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])
    before = counters()
    began = time.perf_counter()
    stepper = load(spec)
    loaded = {"load_seconds": time.perf_counter() - began}
    used = _since(counters(), before)
    if "turn" in spec:
        result = play(stepper, spec["turn"])
        say({**result, **loaded, "kernel": {"load": used, **result["kernel"]}, "about": stepper.about()})
        return 0
    say({**loaded, "kernel": {"load": used}})
    for line in sys.stdin:
        result = play(stepper, json.loads(line))
        say({**result, "about": stepper.about()})
    return 0
