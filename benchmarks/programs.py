"""The programs that benchmarks compare: what files each reads, and one running in a process of its own that takes turns with others."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import peers
import shapes
from shapes import Shape

HERE = Path(__file__).resolve().parent
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Program:
    """A program under test: the runner that drives it, the files it reads and its options."""

    name: str
    script: str
    model: Path
    options: dict[str, Any] = field(default_factory=dict)

    def command(self, *, threads: int, context: int, memory: int | None = None, turn: dict[str, Any] | None = None) -> list[str]:
        """What starts it: for one turn, or, without one, to take turns."""
        spec: dict[str, Any] = {"model": str(self.model), "threads": threads, "memory": memory, "context": context}
        spec |= {"options": self.options} if turn is None else {"options": self.options, "turn": turn}
        return [sys.executable, str(HERE / self.script), json.dumps(spec)]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Running:
    """A loaded program that waits for turns; a context manager. Raises RuntimeError with its last words when it ends too early."""

    def __init__(self, program: Program, *, threads: int, context: int, memory: int | None = None) -> None:
        self.program = program
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            program.command(threads=threads, context=context, memory=memory), env=environment(threads), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self.loaded = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(
        self, prompt: Sequence[int], forced: Sequence[int] = (), seconds: float = 600, probes: bool = False
    ) -> dict[str, Any]:
        """What session.play says of this sequence."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer below tells why
            said = {"prompt": list(prompt), "forced": list(forced), "seconds": seconds, "probes": probes}
            self._process.stdin.write(json.dumps(said) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"{self.program.name} ended with code {self._process.returncode}: {self._errors.read()[-2000:]}")

    def close(self) -> None:
        self._process.kill()
        with self._process:
            pass
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """One process that computes all the time, as any other program beside the measured one might."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def installed(name: str) -> bool:
    return importlib.util.find_spec({"llama.cpp": "llama_cpp", "transformers": "transformers"}[name]) is not None


def moestro(shape: Shape, work: Path, *, bits: int, say: Say, **options: Any) -> Program:
    """moestro on the published bf16 files (16 bits), or on what it packed from them: experts and trunk int4:32."""
    checkpoint = shapes.write_checkpoint(work / shape.name, shape, say=say)
    if bits == 16:
        return Program("moestro", "run_moestro.py", checkpoint, options)
    store = peers.write_packed(checkpoint, work, say=say)
    return Program("moestro", "run_moestro.py", checkpoint, {"store": str(store), **options})


def llama_cpp(
    shape: Shape, work: Path, *, matrices: str, threads: int, say: Say, repack: bool = True, name: str = "llama.cpp"
) -> Program:
    """llama.cpp on a GGUF of the same weights. repack: see run_llamacpp.py. Raises RuntimeError when its quantiser refuses."""
    checkpoint = shapes.write_checkpoint(work / shape.name, shape, say=say)
    path = peers.gguf_path(work, shape, matrices)
    if matrices == "q4_k_m":
        source = peers.write_gguf(checkpoint, peers.gguf_path(work, shape, "bf16"), shape, say=say)
        peers.write_q4_k_m(source, path, threads=threads, say=say)
    else:
        peers.write_gguf(checkpoint, path, shape, matrices=matrices, say=say)
    return Program(name, "run_llamacpp.py", path, {"repack": repack})


def transformers(shape: Shape, work: Path, *, say: Say, experts: str = "grouped_mm") -> Program:
    """transformers in bf16, the weights mapped from files in its own layout."""
    checkpoint = shapes.write_checkpoint(work / shape.name, shape, say=say)
    fused = peers.write_fused(checkpoint, work / f"{shape.name}-fused", shape, say=say)
    return Program("transformers bf16", "run_accelerate.py", fused, {"placement": "mapped", "experts": experts, "resident": 0})


def memory_rate(threads: int, probes: int = 2) -> list[float]:
    """Bytes per second at which this machine reads memory now, probed so many times: the median pass, as a median step is compared
    with it. The best pass would be what the machine does when its neighbours rest."""
    from moestro.kernels.bandwidth import passes

    return [statistics.median(passes(0.2, threads=threads)) for _ in range(probes)]


def beside(before: list[float], after: list[float]) -> float:
    """The memory's rate beside a run: the median of the probes before and after it."""
    return statistics.median([*before, *after])
