"""Runs that stop: by wish, by a kill at any moment, by a folder that is wrong. What is resumed writes the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moestro.core.errors import CheckpointError, StorageError
from moestro.train import checkpoint
from moestro.train.data.tokens import prepare
from moestro.train.log import FILE, Log, read
from moestro.train.parallel import Group
from moestro.train.session import locked, reopen, start

TIMES = ("seconds", "tokens_per_second")


def record(folder: Path) -> list[dict]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read(folder)]


# Everything that has a state: noise in the router, a bias moved by a controller, counts kept in buffers, a schedule of the rate.
MODEL = {
    "router": "noisy_topk",
    "taps": [{"name": "loss_free", "rate": 0.1}],
    "losses": [{"name": "balance", "weight": 0.02, "scope": "ema"}],
}


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopped_and_resumed_equals_never_stopped(make_config, make_loop, tmp_path, stop):
    config = make_config(model=MODEL, steps=6, micro_batch=2, evaluate_every=2)
    whole = make_loop(config, tmp_path / "whole")
    whole.run()
    part = make_loop(config, tmp_path / "part")
    summary = part.run(lambda: part.step == stop)
    assert summary["stopped"] and summary["steps"] == stop and len(record(tmp_path / "part")) < len(record(tmp_path / "whole"))
    again = make_loop(config, tmp_path / "part")
    assert again.resume() and again.step == stop
    assert not again.run()["stopped"]
    assert record(tmp_path / "part") == record(tmp_path / "whole")
    for name, tensor in checkpoint.tensors_of(whole.modules).items():
        assert torch.equal(tensor, checkpoint.tensors_of(again.modules)[name]), name


CHILD = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from moestro.train.config import TrainConfig
from moestro.train.parallel import Group
from moestro.train.session import reopen, start
folder, config = Path(sys.argv[1]), TrainConfig.from_json(json.loads(sys.argv[2]))
loop = reopen(folder, Group()) if (folder / "train.json").exists() else start(config, folder, Group())
loop.run()
"""


def test_killed_at_any_moment(make_config, tmp_path):
    """SIGKILL twice, at moments of their own: during a step or while a checkpoint is being written (there is one every step)."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = make_config(model=MODEL, data={"sources": [str(text)]}, steps=24, save_every=1, micro_batch=2)
    start(config, tmp_path / "whole", Group()).run()
    expected, folder = record(tmp_path / "whole"), tmp_path / "killed"
    reached, kills = 0, 0
    for wait in (0.0, 0.013):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), json.dumps(config.to_json())])
        try:
            while child.poll() is None and len(read(folder)) < reached + 7:
                time.sleep(0.002)
            time.sleep(wait)
            kills += child.poll() is None
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        reached = len(read(folder))
    assert kills == 2 and 0 < reached < len(expected)
    loop = reopen(folder, Group())
    assert 0 < loop.step < 24
    loop.run()
    assert record(folder) == expected


def test_a_log_that_is_ahead_or_cut_is_mended(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert [e["step"] for e in read(tmp_path)] == [1, 2]
    log = Log(tmp_path, 1)
    log.write({"step": 2, "loss": 0.5})
    log.close()
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}]


def test_the_newest_checkpoints_stay(make_config, make_loop):
    loop = make_loop(make_config(steps=7, save_every=2, keep=2))
    loop.run()
    assert sorted(os.listdir(loop.folder / checkpoint.FOLDER)) == ["step-00000006", "step-00000007"]


def test_other_threads_are_said(make_config, make_loop, monkeypatch):
    make_loop(make_config(steps=1)).run()
    same, other = make_loop(make_config()), make_loop(make_config())
    assert same.resume() and same.moved == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert other.resume() and other.moved == ["threads 1 then, 7 now"]


def test_a_half_written_checkpoint_is_none(make_config, make_loop):
    loop = make_loop(make_config(steps=2, save_every=1, keep=5))
    loop.run()
    newest = loop.folder / checkpoint.FOLDER / "step-00000002"
    newest.rename(newest.with_name(newest.name + ".partial"))
    again = make_loop(make_config(steps=2, save_every=1, keep=5))
    assert again.resume() and again.step == 1


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("state.json", b"{", "cannot be read"),
        ("state.json", b'{"format": 99, "step": 2}', "format 99, this version reads 1"),
        ("model.safetensors", b"\0" * 16, "cannot be read"),
        ("optimiser.safetensors", b"", "cannot be read"),
    ],
)
def test_a_damaged_checkpoint(make_config, make_loop, file, damage, said):
    loop = make_loop(make_config(steps=2))
    loop.run()
    (loop.folder / checkpoint.FOLDER / "step-00000002" / file).write_bytes(damage)
    with pytest.raises(CheckpointError, match=said):
        make_loop(make_config(steps=2)).resume()


def test_a_checkpoint_of_another_configuration_seed_or_text(make_config, make_loop, tmp_path, tokens):
    loop = make_loop(make_config(steps=1))
    loop.run()
    with pytest.raises(CheckpointError, match=r"is of another model: \d+ tensors differ, the first is model\.layers\.0"):
        make_loop(make_config(model={"d_expert": 24})).resume()
    with pytest.raises(CheckpointError, match=r"none in the file"):
        make_loop(make_config(model={"d_shared": 8})).resume()
    with pytest.raises(CheckpointError, match="has the seed 0"):
        make_loop(make_config(seed=1)).resume()
    other = make_loop(make_config(steps=1))
    other.stream.tokens = prepare([("a", "other text" * 50)], "bytes", tmp_path / "other")
    with pytest.raises(CheckpointError, match="other text"):
        other.resume()


def test_a_run_in_its_folder(make_config, tmp_path):
    """Started, refused twice, reopened with more steps; its text is no longer needed."""
    (text := tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 30)
    config = make_config(data={"sources": [str(text)]}, steps=2)
    folder = tmp_path / "run"
    folder.mkdir()
    start(config, folder, Group()).run()
    with pytest.raises(StorageError, match=r"holds a run already[\s\S]*--resume"):
        start(config, folder, Group())
    text.unlink()
    with pytest.raises(CheckpointError, match=r"another configuration: batch[\s\S]*only steps, evaluate_every"):
        reopen(folder, Group(), change=lambda data: make_config(data={"sources": [str(text)]}, steps=2, batch=8))
    loop = reopen(folder, Group(), change=lambda data: make_config(data={"sources": [str(text)]}, steps=5))
    assert loop.step == 2 and loop.run()["steps"] == 5
    assert json.loads((folder / "train.json").read_text())["steps"] == 5
    assert reopen(folder, Group()).step == 5
    with pytest.raises(CheckpointError, match="there is no run in"):
        reopen(tmp_path / "none", Group())
    (folder / "train.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        reopen(folder, Group())


def test_a_start_that_failed_leaves_nothing_in_the_way(make_config, tmp_path):
    (text := tmp_path / "a.txt").write_text("short")
    config = make_config(data={"sources": [str(text)]})
    with pytest.raises(ValueError, match="has 6 tokens"):
        start(config, tmp_path / "run", Group())
    text.write_text("long enough " * 50)
    assert start(config, tmp_path / "run", Group()).run()["steps"] == 4


def test_one_process_at_a_time(tmp_path):
    refused = pytest.raises(StorageError, match="another process trains in")
    with locked(tmp_path / "run", Group(), new=True), refused, locked(tmp_path / "run", Group(), new=False):
        pass
    with locked(tmp_path / "run", Group(), new=False):
        pass
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no run"), locked(tmp_path / "run", Group(), new=False):
        pass
