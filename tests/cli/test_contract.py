"""What holds for every verb: fast start, help with examples, --json, exit codes, messages instead of tracebacks."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

import moestro as package
from moestro.cli import reference

VERBS = [path for path in reference.verbs() if path != ("plan",)]
PLANNED = {"inspect", "run", "train", "profile", "plan", "show", "diff", "apply", "eval", "export", "replay", "methods", "doctor"}


def test_the_verbs_are_the_planned_ones():
    assert {path[0] for path in reference.verbs()} == PLANNED
    assert ("plan", "residency") in VERBS


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_has_examples_and_json(path):
    text = reference.help_of(*path)
    assert "Examples:" in text and f"moestro {' '.join(path)}" in text.split("Examples:")[1]
    assert "--json" in text


def test_version(moestro):
    assert moestro("--version") == (0, f"moestro {package.__version__}\n", "")


def test_no_arguments_show_the_help(moestro):
    done = moestro()
    assert "Examples:" in done.out + done.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["run", "--help"]])
def test_start_up_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom moestro.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'huggingface_hub', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=reference.Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_start_up_time(arguments, moestro_process):
    def spent() -> float:  # by children, on the processor: tests may share theirs
        times = os.times()
        return times.children_user + times.children_system

    def once() -> float:
        before = spent()
        assert moestro_process(*arguments).code == 0
        return spent() - before

    assert statistics.median(once() for _ in range(5)) < 0.6  # 0.15 s on an idle machine


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["inspect"], ["inspect", "--nothing"], ["plan", "residency", "x", "--ctx-size", "many"]]
)
def test_wrong_usage_exits_2_with_a_hint(arguments, moestro):
    done = moestro(*arguments)
    assert done.code == 2 and done.out == "" and "Error" in done.err and "help" in done.err.lower()


def test_a_users_error_exits_2_with_a_message_and_no_traceback(moestro, tmp_path):
    done = moestro("inspect", tmp_path / "none", "--json")
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err
    assert done.err.startswith("moestro: there is no folder") and "to fix:" in done.err


def test_a_traceback_for_those_who_ask(moestro, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESTRO_LOG", "debug")
    done = moestro("inspect", tmp_path / "none")
    assert done.code == 2 and "Traceback" in done.err and "there is no folder" in done.err


def test_an_unknown_kernel_level(moestro_process):
    done = moestro_process("doctor", "--no-probe", MOESTRO_KERNELS="turbo")
    assert done.code == 2 and "MOESTRO_KERNELS=turbo" in done.err and "Traceback" not in done.err


def test_an_internal_error_exits_1(monkeypatch, moestro):
    def broken(*args, **kwargs):
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr("moestro.core.method.catalogue", broken)
    done = moestro("methods")
    assert (
        done.code == 1 and "something unforeseen" in done.err and "MOESTRO_LOG=debug" in done.err and "Traceback" not in done.err
    )


def test_ctrl_c_exits_130(monkeypatch, moestro):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moestro.core.method.catalogue", interrupted)
    done = moestro("methods")
    assert done.code == 130 and "Traceback" not in done.err


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m moestro methods --json | head -c 10",
        shell=True,
        capture_output=True,
        text=True,
        cwd=reference.Path(__file__).parents[2],
    )
    assert "Traceback" not in done.stderr and "moestro:" not in done.stderr


def test_the_reference_page_is_fresh():
    done = subprocess.run(
        [sys.executable, "-m", "moestro.cli.reference", "--check"],
        capture_output=True,
        text=True,
        cwd=reference.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
