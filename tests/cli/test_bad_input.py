"""Bad input, one table: everything that can be wrong with a model, a plan, a budget, a trace, a prompt or a disk.

Each case ends with exit code 2 (130 for Ctrl-C) and a message that names what was found and what to do, prints no answer, and
leaves every file as it was: the model, and the plan, trace and packed experts of earlier runs that the command was to replace.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moestro.core.trace import Trace
from moestro.engine import pack as packing
from tests.cli.conftest import write_plan

Harm = Callable[[Path, pytest.MonkeyPatch], object]
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w3.weight"
RUN = "run {m} Hello --plan {d}/plan.json --trace {d}/talk.trace -n 4 --ignore-eos"
FREE = "run {m} Hello -m 16GiB --trace {d}/talk.trace -n 4 --ignore-eos"  # without a plan, which a changed header breaks first
INSPECT = "inspect {m} --no-probe"
PLAN = "plan residency {m} -m 8GiB -o {d}/plan.json"
REPLAY = "replay {d}/talk.trace"
PACK = "apply {d}/plan.json --model {m} -o {d}/new"


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with a model in several shards, and a plan, a trace and packed experts of it."""
    from moestro.cli.main import main
    from moestro.testing.tiny import save_tiny

    folder = tmp_path_factory.mktemp("sound")
    save_tiny("mixtral", folder / "model", max_shard_size="60KB")
    write_plan(folder / "model", folder / "plan.json")
    for command in (RUN, "apply {d}/plan.json --model {m} -o {d}/store"):
        assert main(words(command, folder)) == 0
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy of it to harm."""
    return shutil.copytree(sound, tmp_path / "copy")


def words(command: str, folder: Path) -> list[str]:
    return [word.format(m=folder / "model", d=folder) for word in shlex.split(command)]


def files(folder: Path, *left_out: str) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(left_out)} if left_out else found


# What is done to a sound folder.


def nothing(folder: Path, patch: pytest.MonkeyPatch) -> None:
    pass


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "model").glob("*.safetensors"))


def config(**changes: Any) -> Harm:
    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return harm


def header(name: str, **changes: Any) -> Harm:
    """Another header entry for this tensor, of the same data."""

    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        from moestro.models.checkpoint import Checkpoint

        file = Checkpoint.open(folder / "model").ref(name).file
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        said = json.loads(raw[8 : 8 + length])
        said[name] |= changes
        text = json.dumps(said).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return harm


def values(value: float, *names: str) -> Harm:
    """This number at the beginning of these tensors; every header and size stays."""

    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        from moestro.models.checkpoint import Checkpoint

        for name in names:
            ref = Checkpoint.open(folder / "model").ref(name)
            with open(ref.file, "r+b") as f:
                f.seek(ref.offset)
                f.write(np.float32(value).tobytes())

    return harm


def plan(**changes: Any) -> Harm:
    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        path = folder / "plan.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return harm


def trace(change: Callable[[Path], object]) -> Harm:
    return lambda folder, patch: change(folder / "talk.trace")


def other_trace(**changes: Any) -> Harm:
    def change(path: Path) -> None:
        read = Trace.open(path)
        for name, value in changes.items():
            object.__setattr__(read, name, value(np.array(getattr(read, name))) if callable(value) else value)
        read.save(path)

    return trace(change)


def failing(path: str, error: BaseException, at: int = 1) -> Harm:
    """The function fails at its call number `at`."""

    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        import importlib

        module, name = path.rsplit(".", 1)
        real, calls = getattr(importlib.import_module(module), name), []

        def fails(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) == at:
                raise error
            return real(*args, **kwargs)

        patch.setattr(path, fails)

    return harm


def full(path: str, at: int = 1) -> Harm:
    return failing(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), at)


class Case(NamedTuple):
    """harm: what is wrong. command: what is asked for all the same. says: words of the message. leaves: what may be left behind."""

    harm: Harm
    command: str
    says: tuple[str, ...]
    stdin: bytes = b""
    code: int = 2
    leaves: str = ""


ALL = tuple(EXPERT.format(e) for e in range(4))
MISSING = lambda folder, patch: shards(folder)[1].unlink()  # noqa: E731
SHORT = lambda folder, patch: os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 10)  # noqa: E731
LONG = "x" * 300
TABLE: dict[str, tuple[Case, ...]] = {
    "missing shard": (
        Case(MISSING, RUN, ("lacks 1 of the", "model-00002-of-")),
        Case(MISSING, INSPECT, ("lacks 1 of the", "model-00002-of-")),
        Case(MISSING, PLAN, ("lacks 1 of the", "model-00002-of-")),
        Case(MISSING, PACK, ("lacks 1 of the", "model-00002-of-")),
    ),
    "truncated shard": (
        Case(SHORT, RUN, ("model-00002-of-", "cut short")),
        Case(SHORT, INSPECT, ("model-00002-of-", "cut short")),
        Case(SHORT, PLAN, ("model-00002-of-", "cut short")),
        Case(SHORT, PACK, ("model-00002-of-", "cut short")),
        Case(lambda f, _: os.truncate(shards(f)[0], 4), RUN, ("model-00001-of-", "header would be")),
    ),
    "wrong dtype": (
        Case(header(EXPERT.format(2), dtype="I32"), INSPECT, (EXPERT.format(2), "dtype I32", "F32, F16, BF16")),
        Case(header(EXPERT.format(2), dtype="I32"), PACK, (EXPERT.format(2), "dtype I32", "F32, F16, BF16")),
        Case(header("model.norm.weight", dtype="I32"), FREE, ("model.norm.weight", "I32")),
        Case(header("model.norm.weight", dtype="I32"), FREE + " --trunk native", ("model.norm.weight", "I32")),
        Case(header("model.norm.weight", dtype="F13"), INSPECT, ("model.norm.weight", "F13")),
    ),
    "header that lies about sizes": (
        Case(header("model.norm.weight", shape=[33]), INSPECT, ("model.norm.weight", "132 bytes, but owns 128")),
        Case(header("model.norm.weight", shape=[1 << 60]), RUN, ("model.norm.weight", "but owns 128")),
        Case(header("model.norm.weight", data_offsets=[0, 128]), RUN, ("overlaps",)),
        Case(header("model.norm.weight", data_offsets=[1 << 50, (1 << 50) + 128]), RUN, ("cut short", "model.norm.weight")),
        Case(
            lambda f, _: shards(f)[0].write_bytes((1 << 60).to_bytes(8, "little") + shards(f)[0].read_bytes()[8:]),
            INSPECT,
            ("model-00001-of-", "header would be"),
        ),
    ),
    "NaN weights": (
        Case(values(np.nan, *ALL), RUN, ("layer 1", ".w3.weight", "not finite")),
        Case(values(np.nan, *ALL), PACK, ("layer 1", ".w3.weight", "not finite"), leaves="new.partial"),
        Case(values(np.nan, "model.norm.weight"), RUN, ("1 of the 32 weights of model.norm.weight", "first at [0]")),
        Case(values(np.inf, "model.layers.2.block_sparse_moe.gate.weight"), RUN, ("layers.2.block_sparse_moe.gate", "infinite")),
    ),
    "more slots than experts": (
        Case(plan(slots=[13]), RUN, ("slots are [13]", "from 2 to 12")),
        Case(plan(slots=[13]), PACK, ("slots are [13]", "from 2 to 12")),
        Case(plan(slots=[4, 4, 5], scope="layer"), RUN, ("[4, 4, 5]", "number of experts")),
        Case(plan(slots=[1]), RUN, ("slots are [1]", "from 2 to 12")),
        Case(config(num_experts_per_tok=5), INSPECT, ("4 experts of which 5",)),
        Case(config(num_local_experts=5), PLAN, ("expert 4 of layer 0",)),
    ),
    "unknown family": (
        Case(config(model_type="nobody_knows"), INSPECT, ("does not know", "nobody_knows")),
        Case(config(model_type="nobody_knows"), RUN, ("does not know", "nobody_knows")),
        Case(config(model_type="llama"), INSPECT, ("llama", "Mixture-of-Experts")),
        Case(config(model_type=None), INSPECT, ("model_type",)),
    ),
    "remote-code-only model": (
        Case(config(model_type="their_own", auto_map={"AutoModelForCausalLM": "x.Y"}), RUN, ("their_own", "remote code")),
        Case(config(model_type="their_own", auto_map={"AutoModelForCausalLM": "x.Y"}), PLAN, ("their_own", "remote code")),
    ),
    "budget too small": (
        Case(nothing, "run {m} Hello -m 1MiB --trace {d}/talk.trace", ("1.00MiB cannot hold", "at least", "--memory")),
        Case(nothing, "plan residency {m} -m 1MiB -o {d}/plan.json", ("1.00MiB cannot hold", "at least", "--memory")),
    ),
    "disk full while packing": (
        Case(full("os.pwrite", at=4), PACK, ("new", "No space left", "continues"), leaves="new.partial"),
        Case(full("os.fsync"), PACK, ("new", "No space left", "continues"), leaves="new.partial"),
        Case(
            lambda f, patch: patch.setattr(packing.shutil, "disk_usage", lambda p: type("Usage", (), {"free": 1000})()),
            PACK,
            ("1000 bytes free", "continues"),
            leaves="new.partial",
        ),
        Case(full("os.replace"), PLAN, ("plan.json", "No space left")),
        Case(
            nothing,
            "run {m} Hello --plan {d}/plan.json --trace {m}/config.json/a.trace",
            ("nothing can be written", "another --trace"),
        ),
    ),
    "file changed between plan and run": (
        Case(config(rope_theta=5.0), RUN, ("made for", "same files")),
        Case(config(rope_theta=5.0), PACK, ("made for", "same files")),
        Case(config(rope_theta=5.0), RUN + " --store {d}/store", ("made",)),
        Case(lambda f, _: shards(f)[0].write_bytes(shards(f)[0].read_bytes() + b"x"), RUN, ("made for", "same files")),
        Case(values(0.5, *ALL), RUN + " --store {d}/store", ("store", "other weights", "moestro apply")),
        Case(values(0.5, *ALL), "apply {d}/plan.json --model {m} -o {d}/store", ("store", "other weights")),
        Case(lambda f, _: os.truncate(f / "store" / "experts.bin", 5000), RUN + " --store {d}/store", ("5000 bytes",)),
        Case(nothing, RUN.replace("plan.json", "none.json"), ("no plan at",)),
        Case(plan(slots="x"), RUN, ("plan cannot be read",)),
        Case(plan(context="x"), RUN, ("context is 'x'",)),
        Case(plan(context=0), RUN, ("context is 0",)),
        Case(plan(subjects=[]), RUN, ("names no model",)),
    ),
    "unreadable trace": (
        *(
            case
            for command in (REPLAY, "show {d}/talk.trace", PLAN + " --trace {d}/talk.trace")
            for case in (
                Case(trace(lambda t: os.truncate(t, t.stat().st_size - 50)), command, ("talk.trace", "cut short")),
                Case(trace(lambda t: t.write_bytes(b"\x08" + bytes(7) + b"not json")), command, ("talk.trace", "readable trace")),
                Case(trace(lambda t: t.write_bytes(b"")), command, ("talk.trace", "readable trace")),
                Case(trace(lambda t: t.unlink()), command, ("talk.trace", "no ")),
                Case(other_trace(experts_LTK=lambda ids: ids + 50), command, ("talk.trace", "expert 5")),
            )
        ),
        Case(other_trace(model="0" * 64), REPLAY + " {m}", ("recorded on the model 000000000000",)),
        Case(other_trace(model="0" * 64), PLAN + " --trace {d}/talk.trace", ("recorded on the model 000000000000",)),
    ),
    "prompt longer than the context": (
        Case(nothing, RUN.replace("Hello", LONG), ("tokens", "fewer than 200", "--context")),
        Case(nothing, RUN.replace("Hello", "-"), ("tokens", "fewer than 200"), stdin=LONG.encode()),
        Case(
            lambda f, _: (f / "prompts.txt").write_text(f"Hello\n{LONG}\n"),
            RUN.replace("Hello", "--batch {d}/prompts.txt"),
            ("prompt 1 has", "fewer than 200"),
        ),
        Case(nothing, "run {m} Hello -c 8 -m 16GiB --trace {d}/talk.trace", ("tokens", "fewer than 8")),
    ),
    "non-UTF-8 stdin": (
        Case(nothing, RUN.replace("Hello", "-"), ("standard input is not UTF-8: byte 0xff at position 0",), stdin=b"\xff\xfehi"),
        Case(nothing, RUN.replace("Hello", ""), ("byte 0xe9 at position 3", "iconv"), stdin=b"caf\xe9"),
        Case(nothing, RUN.replace("Hello", "caf\udce9"), ("U+DCE9",)),
        Case(
            lambda f, _: (f / "prompts.txt").write_bytes(b"Hello\ncaf\xe9\n"),
            RUN.replace("Hello", "--batch {d}/prompts.txt"),
            ("prompts.txt is not UTF-8", "position 9"),
        ),
    ),
    "Ctrl-C in the middle": (  # of a run: see the processes below
        Case(
            failing("moestro.engine.pack._write", KeyboardInterrupt(), 4),
            PACK,
            ("continues", "stopped"),
            code=130,
            leaves="new.partial",
        ),
        Case(failing("moestro.kernels.bandwidth.probe", KeyboardInterrupt()), PLAN, ("stopped",), code=130),
        Case(failing("moestro.engine.replay.replay", KeyboardInterrupt(), 2), REPLAY + " --budgets 50%", ("stopped",), code=130),
    ),
}


def rows() -> Iterator[Any]:
    for item, cases in TABLE.items():
        for number, case in enumerate(cases, 1):
            yield pytest.param(case, id=f"{item} {number}: {case.command.split()[0]}")


@pytest.mark.parametrize("case", list(rows()))
def test_bad_input(case, folder, moestro, monkeypatch):
    with monkeypatch.context() as patch:
        case.harm(folder, patch)
        before = files(folder)
        done = moestro(*words(case.command, folder), stdin=case.stdin)
    assert done.code == case.code and done.out == "" and "Traceback" not in done.err, done
    assert all(text in done.err for text in case.says), done.err
    if case.code == 2:
        message = done.err[done.err.index("moestro: ") :]
        assert "\n  expected: " in message or "\n  to fix: " in message, message
    assert (files(folder, case.leaves) if case.leaves else files(folder)) == before


@pytest.mark.parametrize("item", ["disk full while packing", "Ctrl-C in the middle"])
def test_packing_goes_on_where_it_stopped(item, folder, moestro, monkeypatch):
    with monkeypatch.context() as patch:
        TABLE[item][0].harm(folder, patch)
        moestro(*words(PACK, folder))
    written = []
    real = packing._write
    monkeypatch.setattr(packing, "_write", lambda file, record, at: (written.append(at), real(file, record, at)))
    assert moestro(*words(PACK, folder)).code == 0 and len(written) == 12 - 3
    assert files(folder / "new") == files(folder / "store")


def test_the_smallest_budget_that_is_named_works(folder, moestro):
    refused = moestro(*words("plan residency {m} -m 1MiB -o {d}/plan.json", folder))
    named = refused.err.split("--memory ")[1].split()[0].rstrip(",")
    assert moestro(*words(f"run {{m}} Hello -m {named} -n 2", folder)).code == 0


@pytest.mark.parametrize(
    "command", ["run {d}/m.gguf", "run {d}/m.gguf Hello", "inspect {d}/m.gguf", "run {d} Hello", "run m.GGUF"]
)
def test_gguf_files_are_refused_by_name(command, moestro, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    done = moestro(*words(command, tmp_path), stdin=b"Hello")
    assert done.code == 2 and done.out == "" and "GGUF" in done.err and "safetensors" in done.err and "llama.cpp" in done.err


def test_a_chat_goes_on_after_what_cannot_be_answered(chat):
    bad = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    done = chat("Hello\n", LONG + "\n", bad, "caf\udce9\n", "And then?\n")
    assert done.code == 0 and "fewer than 200" in done.err and done.err.count("not UTF-8") == 2
    assert done.out == chat("Hello\n", "And then?\n").out, "what was refused is not part of the conversation"


def test_ctrl_c_at_the_prompt_of_a_chat_ends_it_with_its_account(chat):
    done = chat(KeyboardInterrupt())
    assert done.code == 130 and done.out == "" and "Traceback" not in done.err and "EXACT" not in done.err
    done = chat("Hello\n", KeyboardInterrupt())
    assert done.code == 130 and done.out == chat("Hello\n").out and "EXACT" in done.err and "Traceback" not in done.err


def test_ctrl_c_in_the_middle_of_an_answer_keeps_what_there_is(process, tmp_path):
    running = process("Hello", "-n", 150, "--temperature", 1, "--trace", tmp_path / "talk.trace")
    assert running.stdout.read(1), "it has begun to answer"
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"Traceback" not in err
    assert out.endswith(b"\n") and b"answer" in err and b"EXACT" in err
    assert 0 < Trace.open(tmp_path / "talk.trace").tokens < 190


def test_ctrl_c_before_the_answer(process):
    running = process("Hello", "-n", 5)
    maps = Path(f"/proc/{running.pid}/maps")
    while maps.exists() and running.poll() is None and "numpy" not in maps.read_text():
        time.sleep(0.01)
    time.sleep(0 if maps.exists() else 0.5)  # the command is up, the model is not
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130 and out == b"" and b"Traceback" not in err
