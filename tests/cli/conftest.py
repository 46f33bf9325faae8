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
