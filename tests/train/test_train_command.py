"""`moestro train`: a run, Ctrl-C and --resume, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moestro.cli.main import main
from moestro.models.open import open_model
from moestro.models.tokenizer import Tokenizer
from moestro.models.trained import load_trained
from moestro.train.config import recipes
from moestro.train.log import read
from tests.house.source import ROOT

MODEL = ["d_model=16", "layers=1", "heads=2", "num_experts=4", "d_expert=8"]
SMALL = ["batch=4", "data.length=16", *(f"model.{row}" for row in MODEL), "data.weights={}", "evaluate_sequences=2"]


@pytest.fixture
def train(capsys, tmp_path):
    """train(...) -> (exit code, stdout, stderr) of a small run in tmp_path/run, unless it is told otherwise."""

    def call(*arguments: object, small: bool = True) -> tuple[int, str, str]:
        settings = [part for row in SMALL for part in ("--set", row)] if small else []
        capsys.readouterr()
        code = main(["train", *map(str, arguments), *settings])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    for name in ("ham", "egg"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "a.txt").write_text(f"{name} and more {name}, please. " * 40)
    return tmp_path / "texts"


def test_a_run_from_data_to_model(train, text, tmp_path, capsys):
    data = ["--data", text, "--data", f"third={text / 'egg'}"]
    code, out, err = train("tiny", *data, "-o", tmp_path / "run", "--steps", 5, "--export", "mixtral", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (
        result["steps"] == 5
        and result["tokens"] == 5 * 4 * 16
        and set(result["evaluation"]["domains"]) == {"ham", "egg", "third"}
    )
    assert "step 5/5  loss" in err and "tokens/s" in err and "MaxVio" in err and "held out: loss" in err
    assert sum("loss" in entry for entry in read(tmp_path / "run")) == 5
    module = load_trained(result["model"])
    ids = Tokenizer.open(result["model"]).encode("ham and")
    with torch.no_grad():
        assert module(torch.tensor([ids])).logits_BTV.shape == (1, 7, 257)
    assert sum(p.numel() for p in module.parameters()) == result["parameters"]
    assert main(["run", result["exported"]["mixtral"], "--raw", "ham and", "-n", "4", "--ignore-eos", "--json"]) == 0
    ran = json.loads(capsys.readouterr().out)
    ids = Tokenizer.open(result["model"]).encode("ham and")
    for _ in range(4):  # greedy decoding of the trained module, written out
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
    assert ran["answers"][0]["tokens"] == ids[7:]
    with torch.no_grad():
        theirs = open_model(result["exported"]["mixtral"]).module(input_ids=torch.tensor([ids])).logits
        torch.testing.assert_close(theirs, module(torch.tensor([ids])).logits_BTV, rtol=1e-4, atol=1e-4)


def test_the_help_and_the_how_to_name_every_recipe(capsys):
    assert main(["train", "--help"]) == 0
    told = set(re.findall(r"\w+", capsys.readouterr().out.partition("or a recipe:")[2].partition(".")[0]))
    table = (ROOT / "docs/howto/train-a-model.md").read_text().partition("## Recipes")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert told == set(listed) == set(recipes()) and len(listed) == len(set(listed))


def test_a_family_that_cannot_express_the_model_is_refused_before_training(train, text, tmp_path):
    arguments = ["tiny", "--data", text, "-o", tmp_path / "run", "--set", "model.activation=relu", "--export", "auto"]
    code, out, err = train(*arguments)
    assert code == 2 and out == "" and "no Hugging Face family" in err and not (tmp_path / "run" / "log.jsonl").exists()


def test_resume_goes_on_and_refuses_another_configuration(train, text, tmp_path):
    run = tmp_path / "run"
    assert train("tiny", "--data", text, "-o", run, "--steps", 3, "--quiet")[0] == 0
    code, _, err = train("tiny", "--data", text, "-o", run)
    assert code == 2 and "holds a run already" in err and f"moestro train --resume {run}" in err
    code, _, err = train("--resume", run, "--set", "optimiser.rate=0.5", small=False)
    assert code == 2 and "another configuration: optimiser.rate" in err
    code, out, err = train("--resume", run, "--steps", 6, small=False)
    assert code == 0 and "going on after step 3" in err and out.startswith("6 steps") and "held out" in out
    assert [entry["step"] for entry in read(run) if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert train("--resume", run, "-q", small=False)[:2] == (0, out.replace(out.split(" at ")[1].split(":")[0], "0/s"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "neither --output nor --resume"),
        (["tiny", "-o", "RUN", "--resume", "RUN"], "both --output and --resume"),
        (["-o", "RUN"], "no configuration"),
        (["huge", "-o", "RUN"], "there is no configuration huge"),
        (["--resume", "RUN/none"], "there is no run in"),
        (["tiny", "-o", "RUN", "--data", "RUN/none"], "there is no text at"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "data.length=5000"], "5000"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "model.top_k=9"], "top_k 9 with num_experts"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "model.router=nobody"], "'nobody' is not a method of kind 'router'"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "model.router.temper=1"], "has no option 'temper'"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "objective=winning"], "'winning' is not a method of kind 'objective'"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "objective.smooth=1"], "has no option smooth"),
        (
            ["tiny", "-o", "RUN", "--data", "TEXT", "--set", 'phases=["dusk"]'],
            "'dusk' is not a method of kind 'training schedule'",
        ),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "model.vocabulary=99"], "a vocabulary of 99"),
        (["tiny", "-o", "RUN", "--data", "EMPTY"], "the data has no text"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "nothing=1"], "no setting nothing"),
        (["tiny", "-o", "RUN", "--data", "TEXT", "--set", "micro_batch=3"], "a batch of 4"),
        (["tiny", "-o", "TEXT/ham/a.txt", "--data", "TEXT"], "cannot be written"),
    ],
)
def test_bad_input_exits_2(train, text, tmp_path, arguments, said):
    (tmp_path / "empty.txt").write_text("")
    places = {"RUN": tmp_path / "run", "TEXT": text, "EMPTY": tmp_path / "empty.txt"}
    for name, place in places.items():
        arguments = [a.replace(name, str(place)) for a in arguments]
    settings = [part for row in SMALL for part in ("--set", row)]
    new = "--resume" not in arguments
    code, out, err = train(*(settings if new else []), *arguments, small=False)
    assert code == 2 and out == "" and said in err and "Traceback" not in err
    assert not (tmp_path / "run" / "train.json").exists()


def test_ctrl_c_stops_with_a_checkpoint(text, tmp_path):
    run = tmp_path / "run"
    settings = [part for row in SMALL for part in ("--set", row)]
    child = subprocess.Popen(
        [sys.executable, "-m", "moestro", "train", "tiny", "--data", text, "-o", run, "--steps", "100000", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while child.poll() is None and len(read(run)) < 5:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and out == "" and "Traceback" not in err
    (last,) = [line for line in err.splitlines() if line.startswith("stopped after step")]
    step = int(last.split()[3])
    assert f"moestro train --resume {run}" in last and read(run)[-1]["step"] == step >= 4
    assert (run / "checkpoints" / f"step-{step:08}").is_dir()
