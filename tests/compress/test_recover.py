"""`moestro train METHOD --model`: recovered and pruned models are models as before, learned skipping is obeyed by both runners."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.compress.record import read_plan_of
from moestro.engine.engine import Engine
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.testing.tiny import save_tiny
from tests.cli.conftest import moestro  # noqa: F401

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "into", "some", "deep", "green", "wood")
QUICK = ("--steps", "6", "--set", "data.length=24", "--set", "batch=4", "--set", "optimiser.rate=0.01", "-q")
IDS = [list(range(5, 25)), list(range(40, 60))]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("work")
    save_tiny("olmoe", folder / "model", num_hidden_layers=2, num_experts=8, num_experts_per_tok=4)
    (folder / "book.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=900)))
    (folder / "other.txt").write_text(" ".join(random.Random(1).choices(WORDS, k=120)))
    return folder


def judged(moestro, work: Path, model: str) -> dict:  # noqa: F811
    done = moestro("eval", work / model, "--against", work / "model", "--data", work / "other.txt", "--length", "48", "--json")
    assert done.code == 0, done.err
    return done.json


def engine_equals_live(folder: Path) -> Engine:
    live = open_model(folder)
    with Engine.open(folder, threads=1) as engine:
        for a, b in zip(engine.run(IDS), live.run(IDS), strict=True):
            np.testing.assert_allclose(a.logits_TV, b.logits_TV.numpy(), atol=3e-5)
    return engine


def test_recovered_after_pruning(moestro, work):  # noqa: F811
    done = moestro("profile", work / "model", work / "book.txt", "-o", work / "p", "--length", "48", "-q")
    assert done.code == 0, done.err
    assert (
        moestro("plan", "frequency", work / "model", "--profile", work / "p", "--keep", "5", "-o", work / "plan.json", "-q").code
        == 0
    )
    assert moestro("apply", work / "plan.json", "-o", work / "small", "-q").code == 0
    before = judged(moestro, work, "small")
    done = moestro("train", "router_norms:mix=1.0", "--model", work / "small", "--against", work / "model", "--data", work / "book.txt",
                   "-o", work / "better", "--steps", "20", *QUICK[2:], "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["steps"] == 20 and done.json["before"]["loss"] > 0 and not list(work.glob("better.*"))
    plan = read_plan_of(work / "better")
    assert plan.judged == () and plan.method.endswith("> train.tuning.router_norms") and "20 steps" in plan.stated[-1]
    assert judged(moestro, work, "better")["kl"] < before["kl"]
    assert "trained by train.tuning.router_norms" in (work / "better" / "README.md").read_text()
    again = moestro(
        "train", "router_norms", "--model", work / "small", "--data", work / "book.txt", "-o", work / "better", *QUICK
    )
    assert again.code == 2 and "exists" in again.err
    none = moestro("train", "router_norms", "--model", work / "small", "--data", work / "book.txt", "-o", work / "none", *QUICK)
    assert none.code == 2 and "--against" in none.err
    (work / "word.txt").write_text("hi")
    asked = ("train", "router_norms", "--model", work / "small", "--against", work / "model", "-o", work / "none")
    short = moestro(*asked, "--data", work / "word.txt", *QUICK)
    assert short.code == 2 and "or more" in short.err and not list(work.glob("none*")), "the next text is another one"


def test_learned_masks_are_obeyed(moestro, work):  # noqa: F811
    done = moestro("train", "otp:price=0.3", "--model", work / "model", "--data", work / "book.txt", "-o", work / "masked",
                   "--steps", "20", *QUICK[2:], "--set", "optimiser.rate=0.05")  # fmt: skip
    assert done.code == 0, done.err
    found = judged(moestro, work, "masked")
    assert 0.1 < found["skipped"] < 0.8 and found["kl"] > 0
    engine = engine_equals_live(work / "masked")
    assert engine.changes[1:] == ("experts are skipped by layers.taps.learned_mask",) and "train.tuning.otp" in engine.changes[0]
    (work / "masked" / "taps" / "weights.safetensors").write_bytes(b"nothing")
    broken = moestro("eval", work / "masked", "--against", work / "model", "--data", work / "other.txt")
    assert broken.code == 2 and "taps" in broken.err


def test_each_method_has_a_rate_of_its_own(moestro, work):  # noqa: F811
    def rate(method: str, out: str, *settings: str) -> float:
        done = moestro("train", method, "--model", work / "model", "--against", work / "model", "--data", work / "book.txt",
                       "-o", work / out, "--steps", "1", *QUICK[2:6], *settings, "-q", "--json")  # fmt: skip
        assert done.code == 0, done.err
        return done.json["rate"]

    assert rate("router_norms", "chosen", "--set", "optimiser.rate=0.07") == 0.07
    assert rate("router_norms", "usual") == 1e-3, "what one run was told stays with it"
    assert rate("tsep:keep=8", "whole") == 1e-4
    assert rate("otp", "networks") == 1e-2


def test_compressed_experts_run_in_the_engine(moestro, work):  # noqa: F811
    done = moestro(
        "train", "compressed_experts", "--model", work / "model", "--data", work / "book.txt", "-o", work / "ce", *QUICK
    )
    assert done.code == 0, done.err
    assert judged(moestro, work, "ce")["skipped"] == pytest.approx(0.5)
    engine_equals_live(work / "ce")
    taps = json.loads((work / "ce" / "moestro.json").read_text())["plan"]["layers"][1]["taps"]
    assert taps == [{"tap": "layers.taps.compressed_experts", "settings": {"arrays": "layer-1.", "main": 2}}]
    plain = open_model(work / "ce")
    for layer in plain.layers:
        layer.scaling = None
    a, b = (next(iter(m.run(IDS[:1]))).logits_TV for m in (plain, open_model(work / "ce")))
    assert (a - b).abs().max() > 1e-3, "it is the vectors that the runners read"


def test_a_task_keeps_its_experts(moestro, work):  # noqa: F811
    done = moestro("train", "tsep:keep=5", "--model", work / "model", "--data", work / "book.txt", "-o", work / "task", *QUICK)
    assert done.code == 0, done.err
    facts = describe(Checkpoint.open(work / "task")).facts
    assert [la.num_experts for la in facts.layers] == [5, 5]
    plan = read_plan_of(work / "task")
    assert plan.experts == 5 and plan.sizes[1] < plan.sizes[0] and not list(work.glob("task.*"))
    assert judged(moestro, work, "task")["agreement"] > 0.3
    engine_equals_live(work / "task")
