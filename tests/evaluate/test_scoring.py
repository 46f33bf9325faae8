"""`moestro eval --tasks`: what is scored, written down, paired and refused. All tasks are written here, nothing is downloaded."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli.harness import add_model
from moestro.compress.record import card, read_plan_of
from moestro.core.errors import InputError
from moestro.core.plan import read_plan
from moestro.core.plans.compression import CompressionPlan, Judged, TaskScore
from moestro.evaluate.scoring import find_tasks, paired, score, unknown
from moestro.evaluate.tasks import TaskModel
from moestro.models.open import open_model
from moestro.models.tokenizer import Tokenizer
from moestro.testing.tiny import save_tiny
from tests.cli.conftest import moestro  # noqa: F401
from tests.evaluate.local_tasks import ANSWER, CHOICE, LAST_WORD, TEXTS, write_task

LINES = ("the fox", "a dog", "five boxes", "my jug", "the lazy hill", "one", "two of them", "not now", "a quick", "over")
CHOICES = [" was", " had", " sat", " ran"]
TASKS = "choice,answer,last,texts"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny OLMoE, tasks whose right answers are its own, a copy of it made by a plan that changes nothing, and a ruin."""
    from moestro.cli.main import main

    torch.set_num_threads(1)
    work = tmp_path_factory.mktemp("work")
    save_tiny("olmoe", work / "model")
    model = TaskModel(open_model(work / "model"), Tokenizer.open(work / "model"))
    rows: list[dict[str, Any]] = [{"text": line, "choices": CHOICES, "gold": 0, "answer": " x"} for line in LINES]
    write_task(work / "tasks", "choice", CHOICE, rows, target_delimiter="")
    write_task(work / "tasks", "answer", ANSWER, rows)
    tasks = find_tasks(["choice", "answer"], work / "tasks")
    samples = score(tasks, model)["samples"]
    for row, chosen, said in zip(rows, samples["choice"], samples["answer"], strict=True):
        row["gold"] = max(range(4), key=lambda i, s=chosen: s["filtered_resps"][i][0])
        row["answer"] = said["filtered_resps"][0]
    for path in (work / "tasks").glob("*"):
        if path.is_file():
            path.unlink()
    write_task(work / "tasks", "choice", CHOICE, rows, target_delimiter="")
    write_task(work / "tasks", "answer", ANSWER, rows)
    write_task(work / "tasks", "last", LAST_WORD, rows)
    write_task(work / "tasks", "texts", TEXTS, rows)
    (work / "book.txt").write_text("pack my box with five dozen liquor jugs " * 3)
    assert main(["profile", str(work / "model"), str(work / "book.txt"), "-o", str(work / "p"), "--length", "48", "-q"]) == 0
    for name, keep in (("same", "8"), ("ruin", "4")):
        options = ["--profile", str(work / "p"), "--keep", keep, "-o", str(work / f"{name}.json"), "--allow-unseen", "-q"]
        assert main(["plan", "compress.criteria.frequency", str(work / "model"), *options]) == 0
        assert main(["apply", str(work / f"{name}.json"), "-o", str(work / name), "-q"]) == 0
    return work


def asked(moestro, work: Path, model: str, *more: object):  # noqa: F811
    return moestro(
        "eval", work / model, "--against", work / "model", "--task-folder", work / "tasks", "--length", "48", "--json", *more
    )


def test_a_model_against_itself_changes_nothing(moestro, work):  # noqa: F811
    done = asked(moestro, work, "same", "--tasks", TASKS)
    assert done.code == 0, done.err
    assert done.err == "" and done.json["perplexity"] is None and "loss" not in done.json
    rows = {(row["task"], row["metric"]): row for row in done.json["tasks"]}
    assert list(rows) == [("choice", "acc"), ("choice", "acc_norm"), ("answer", "exact_match"), ("last", "perplexity"),
                          ("last", "acc"), ("texts", "byte_perplexity")]  # fmt: skip
    assert all(row["value"] == row["reference"] and row["documents"] == len(LINES) for row in rows.values())
    assert rows["choice", "acc"]["reference"] == rows["answer", "exact_match"]["reference"] == 1, "they are its own answers"
    for key in (("choice", "acc"), ("choice", "acc_norm"), ("answer", "exact_match"), ("last", "acc")):
        assert (rows[key]["lost"], rows[key]["gained"], rows[key]["chance"]) == (0, 0, 1)
    assert rows["last", "perplexity"]["lost"] is None and rows["last", "perplexity"]["error"] > 0
    assert rows["texts", "byte_perplexity"]["higher_is_better"] is False and rows["choice", "acc"]["higher_is_better"] is True


def test_a_ruin_scores_worse_and_everything_is_written_down(moestro, work):  # noqa: F811
    done = asked(moestro, work, "ruin", "--tasks", "choice", "--tasks", "answer,last", "--data", work / "book.txt",
                 "--plan", work / "ruin.json", "--limit", 8)  # fmt: skip
    assert done.code == 0, done.err
    rows = {(row["task"], row["metric"]): row for row in done.json["tasks"]}
    told = rows["choice", "acc"]
    assert told["value"] < 1 == told["reference"] and told["limited"] and told["documents"] == 8
    assert told["lost"] == round(8 * (1 - told["value"])) and told["gained"] == 0
    assert told["chance"] == pytest.approx(min(1, 2 * 0.5 ** told["lost"]))
    assert rows["answer", "exact_match"]["lost"] > 3, "answers are easily changed"
    assert done.json["kl"] > 0 and done.json["loss"] is not None
    plan = read_plan_of(work / "ruin")
    assert isinstance(plan, CompressionPlan) and plan == read_plan(work / "ruin.json")
    (found,) = plan.judged
    assert {(t.task, t.metric): t.value for t in found.tasks} == {key: row["value"] for key, row in rows.items()}
    written = json.loads((work / "ruin" / "moestro.json").read_text())["plan"]["judged"][0]["tasks"]
    assert [row["lost"] for row in written] == [row["lost"] for row in rows.values()]
    told_card = (work / "ruin" / "README.md").read_text()
    assert (
        f"| choice | 0 | acc | the first 8 | {told['value']:.4f} ± {told['error']:.4f} | 1.0000 ± 0.0000 | {told['lost']} | 0 |"
        in told_card
    )
    assert "book.txt" in told_card and "has not been measured" not in told_card
    shown = moestro("show", work / "ruin.json").out
    assert "documents of choice: acc" in shown and f"{told['lost']} from right to wrong" in shown and "perplexity" in shown


def test_both_runners_and_the_command_of_lm_eval_agree(work, moestro, monkeypatch):  # noqa: F811
    """Three ways to the same numbers: through transformers, through the engine, and as lm-eval's model of that name."""
    kept = ("--tasks", "choice,last", "--limit", 4, "--fewshot", 2)
    rows = [asked(moestro, work, "ruin", "--runner", name, *kept).json["tasks"] for name in ("transformers", "engine")]
    assert [r["fewshot"] for r in rows[0]] == [2, 2, 2, 2]
    for one, other in zip(*rows, strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-3)
        assert one["reference"] == pytest.approx(other["reference"], rel=1e-3)
    import lm_eval
    from lm_eval.tasks import TaskManager

    add_model()
    add_model()
    manager = TaskManager(include_path=str(work / "tasks"), include_defaults=False)
    said = f"pretrained={work / 'ruin'},runner=engine,max_length=200,threads=1"
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    found = lm_eval.simple_evaluate(
        "moestro", model_args=said, tasks=["choice", "last"], num_fewshot=2, limit=4, task_manager=manager, bootstrap_iters=10
    )
    assert found is not None
    got = {(task, key.partition(",")[0]): value for task, row in found["results"].items() for key, value in row.items()}
    for row in rows[1]:
        assert got[row["task"], row["metric"]] == pytest.approx(row["value"], rel=1e-6)


def test_lm_evals_own_command_knows_the_model(work, tmp_path, monkeypatch, capsys):
    import lm_eval.tasks

    from moestro.cli.harness import main

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))  # takes seconds
    words = [
        "run",
        "--model",
        "moestro",
        "--tasks",
        "choice",
        "--include_path",
        str(work / "tasks"),
        "--output_path",
        str(tmp_path / "out.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--model_args", f"pretrained={work / 'model'}"])
    assert main() == 0
    assert "|choice|" in capsys.readouterr().out
    (told,) = tmp_path.rglob("out*.json")
    assert json.loads(told.read_text())["results"]["choice"]["acc,none"] == 1
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--model_args", f"pretrained={work / 'model'}", "--batch_size=4"])
    assert main() == 2 and "batch size is 4" in capsys.readouterr().err


def test_groups_and_tags_are_what_they_are_made_of(work, tmp_path):
    rows = [json.loads(line) for line in (work / "tasks" / "choice.jsonl").read_text().splitlines()]
    write_task(tmp_path, "first", CHOICE, rows[:4], target_delimiter="", tag="both")
    write_task(tmp_path, "second", CHOICE, rows[4:], target_delimiter="", tag="both")
    whole = {"group": "whole", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "whole.yaml").write_text(json.dumps(whole | {"metadata": {"version": 2}}))
    (tmp_path / "loose.yaml").write_text(json.dumps({"group": "loose", "task": ["second"]}))
    text = Tokenizer.open(work / "model")
    old, new = (TaskModel(open_model(work / name), text) for name in ("model", "ruin"))

    def scores(name: str) -> list[TaskScore]:
        tasks = find_tasks([name], tmp_path, index=False)
        return [t for t in paired(tasks, score(tasks, new), score(tasks, old)) if t.metric == "acc"]

    apart = scores("both")
    assert [(t.task, t.documents) for t in apart] == [("first", 4), ("second", 6)]
    (one,) = scores("whole")
    assert (one.task, one.documents, one.reference, one.version) == ("whole", 10, 1, "2")
    assert one.value == pytest.approx((4 * apart[0].value + 6 * apart[1].value) / 10)
    assert (one.lost, one.gained) == (sum(t.lost or 0 for t in apart), 0) and one.error is not None
    assert [t.task for t in scores("loose")] == ["second"]


def test_the_sign_test():
    def chance(lost: int | None, gained: int | None) -> float | None:
        return TaskScore("t", "acc", 0.5, 0.5, None, None, 100, lost=lost, gained=gained).chance

    assert chance(None, None) is None and chance(0, 0) == chance(5, 5) == 1
    assert chance(5, 0) == chance(0, 5) == 2 / 32 and chance(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert 0 < chance(3000, 2000) < 1e-30  # type: ignore[operator]
    (line,) = Judged(tasks=(TaskScore("t", "f1", None, 0.5, None, 0.25, 7),)).summary()
    assert line == "measured on 7 documents of t: f1 no number, original 0.5000 ± 0.2500"


def test_plans_of_before_load(work):
    plan = read_plan_of(work / "same")
    old = plan.to_json() | {
        "judged": [
            {"data": "text", "tokens": 10, "perplexity": 5.0, "reference": 4.0, "kl": 0.1, "kl_error": 0.01, "agreement": 0.9}
        ]
    }
    again = CompressionPlan.from_json(old)
    assert again.judged == (Judged("text", 10, 5.0, 4.0, 0.1, 0.01, 0.9),) and again.judged[0].loss == 0.25
    told = card({"moestro": "0", "source": {"model": "a/b"}, "plan": old})
    assert "+25.00 %" in told and "| task |" not in told
    assert "has not been measured" in card({"moestro": "0", "source": {"model": "a/b"}, "plan": old | {"judged": []}})


WRONG = {
    "pictures": ({"doc_to_image": ["x"]}, "images or sound"),
    "odd": ({"output_type": "wonder"}, "asks for wonder"),
    "unsafe": ({"unsafe_code": True}, "runs what the model writes"),
    "trusting": ({"dataset_kwargs": {"trust_remote_code": True}}, "code from the Hub"),
    "foreign": ({"metric_list": [{"metric": "nobodys", "aggregation": "mean"}]}, "computes nobodys with code"),
    "hub": ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "computes acc with code"),
    "drawn": (ANSWER | {"generation_kwargs": {"do_sample": True, "temperature": 0.8, "until": ["."]}}, "temperature 0.8"),
    "beams": (ANSWER | {"generation_kwargs": {"num_beams": 5, "until": ["."]}}, "num_beams 5"),
    "away": ({"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "unset HF_HUB_OFFLINE"),
    "lost": ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, "cannot be loaded"),
    "broken": ({"doc_to_text": "{{ text.nothing() }}"}, "cannot be loaded"),
    "hungry": ({"num_fewshot": 500}, "cannot be loaded"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tasks_that_cannot_be(name, tmp_path, monkeypatch):
    changes, said = WRONG[name]
    write_task(tmp_path, name, CHOICE, [{"text": "a", "choices": ["b", "c"], "gold": 0, "answer": "d"}] * 2, **changes)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        find_tasks([name], tmp_path)
    assert said in str(error.value) and name in str(error.value)


def test_names_that_are_none():
    with pytest.raises(InputError, match="did you mean arc_easy"):
        unknown("arc_eazy", ["arc_easy", "gsm8k"])
    with pytest.raises(InputError, match="lm_eval ls tasks"):
        unknown("qqq", ["arc_easy"])
    with pytest.raises(InputError, match="no folder"):
        find_tasks(["x"], "/nowhere")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "neither --data nor --tasks"),
        (("--data", "x.txt", "--limit", 3), "no --tasks"),
        (("--tasks", "choice,"), "a task has no name"),
        (("--tasks", "choice", "--task-folder", "/nowhere"), "no folder"),
    ],
)
def test_wishes_that_cannot_be(moestro, work, words, said):  # noqa: F811
    before = (work / "same" / "README.md").read_bytes()
    done = moestro("eval", work / "same", "--against", work / "model", *words)
    assert done.code == 2 and said in done.err and done.out == ""
    assert (work / "same" / "README.md").read_bytes() == before


def test_without_lm_eval_or_a_tokenizer(moestro, work, tmp_path, monkeypatch):  # noqa: F811
    import shutil

    shutil.copytree(work / "model", tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    words = ("eval", work / "same", "--tasks", "choice", "--task-folder", work / "tasks")
    done = moestro(*words, "--against", tmp_path / "mute")
    assert done.code == 2 and "no tokenizer.json" in done.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = moestro(*words, "--against", work / "model")
    assert done.code == 2 and "pip install 'moestro[eval]'" in done.err
    with pytest.raises(InputError, match="not installed"):
        add_model()
