"""Runs the command in this process, or in one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def moestro(capsys, monkeypatch) -> Callable[..., Done]:
    """moestro("inspect", folder, ...) -> Done; `stdin` is what is piped in."""

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        from moestro.cli.main import main

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return call


@pytest.fixture
def moestro_process() -> Callable[..., Done]:
    """The same in a process of its own."""

    def call(*arguments: object, stdin: bytes = b"", **env: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "moestro", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            env=os.environ | env,
            cwd=ROOT,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny random Mixtral checkpoint with a tokenizer of single characters."""
    from moestro.testing.tiny import save_tiny

    folder = tmp_path_factory.mktemp("models") / "mixtral"
    save_tiny("mixtral", folder)
    return folder


@pytest.fixture(scope="session")
def plan(tiny, tmp_path_factory) -> Path:
    """A plan for the tiny model with few slots, and no budget to break."""
    return write_plan(tiny, tmp_path_factory.mktemp("plans") / "plan.json")


def write_plan(model: Path, path: Path) -> Path:
    """A plan by hand: 7 slots for all layers, a context of 200 tokens."""
    from moestro.core.plan import Subject
    from moestro.core.plans.residency import Memory, ResidencyPlan
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    facts = describe(Checkpoint.open(model)).facts
    ResidencyPlan(
        subjects=(Subject(str(model), facts.fingerprint),),
        method="engine.residency",
        memory=Memory(4 * 2**30, 0, 0, 0, 0, 0),
        scope="global",
        slots=(7,),
        eviction="engine.evict.lru",
        predictor="engine.predict.none",
        context=200,
    ).save(path)
    return path


@pytest.fixture
def process(tiny, plan) -> Callable[..., subprocess.Popen]:
    """process(...) starts `moestro run TINY ... --plan PLAN` and does not wait for it."""

    def start(*arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "moestro", "run", str(tiny), *map(str, arguments), "--plan", str(plan), "--ignore-eos"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )

    return start


class Terminal:
    """A standard input that is a terminal and says these lines, or raises them."""

    encoding = "utf-8"

    def __init__(self, *lines: str | BaseException) -> None:
        self.lines = list(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        line = self.lines.pop(0) if self.lines else ""
        if isinstance(line, BaseException):
            raise line
        return line


@pytest.fixture
def chat(capsys, monkeypatch, tiny, plan) -> Callable[..., Done]:
    """chat("Hello\\n", ...) -> Done: a person at a terminal; answers of six tokens."""

    def call(*lines: str | BaseException, flags: tuple[str, ...] = ()) -> Done:
        from moestro.cli.main import main

        monkeypatch.setattr(sys, "stdin", Terminal(*lines))
        capsys.readouterr()
        code = main(["run", str(tiny), "--plan", str(plan), "--ignore-eos", "-n", "6", *flags])
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return call
