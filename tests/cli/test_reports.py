"""methods, show, diff, doctor and inspect: what they print, and that --json is the same in plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moestro.core.method import catalogue
from moestro.core.plan import Subject
from moestro.core.plans.residency import Memory, ResidencyPlan
from moestro.core.trace import Trace


def a_plan() -> ResidencyPlan:
    return ResidencyPlan(
        subjects=(Subject("models/tiny", "a" * 64),),
        method="a.method",
        memory=Memory(2**30, 1, 2, 3, 4, 5),
        scope="global",
        slots=(9,),
        eviction="an.eviction",
        predictor="a.predictor",
    )


@pytest.fixture
def trace(tmp_path):
    """Two sequences decoded together; layer 0 always takes expert 1, layer 1 expert 0 and 2 in turn."""
    tokens = 8
    sequences = np.array([0, 1] * 4, np.int32)
    ids = np.stack([np.full((tokens, 1), 1), np.array([[0], [2], [2], [2], [0], [2], [2], [2]])]).astype(np.int16)
    made = Trace(
        tokens_T=np.arange(tokens, dtype=np.int32),
        sequences_T=sequences,
        positions_T=np.repeat(np.arange(4, dtype=np.int32), 2),
        steps_T=np.repeat(np.arange(4, dtype=np.int32), 2),
        prefill_T=np.array([1, 1, 0, 0, 0, 0, 0, 0], np.uint8),
        experts_LTK=ids,
        weights_LTK=np.ones(ids.shape, np.float16),
        num_experts=(4, 4),
        model="b" * 64,
    )
    made.save(tmp_path / "a.trace")
    return tmp_path / "a.trace"


def test_methods_lists_the_catalogue(moestro):
    done = moestro("methods")
    rows = catalogue()
    assert done.code == 0 and all(row["name"] in done.out and row["title"] in done.out for row in rows)
    assert moestro("methods", "--json").json == rows


def test_methods_of_a_kind(moestro):
    kind = catalogue()[0]["kind"]
    shown = moestro("methods", "--kind", kind, "--json").json
    assert shown and {row["kind"] for row in shown} == {kind}
    done = moestro("methods", "--kind", "nonsense")
    assert done.code == 2 and kind in done.err


def test_methods_shows_one_card(moestro):
    row = catalogue()[0]
    done = moestro("methods", row["name"])
    assert row["title"] in done.out and row["header"]["Idea"] in done.out and row["fidelity"] in done.out
    assert moestro("methods", row["name"], "--json").json == row
    assert moestro("methods", "no.such.method").code == 2


def test_show_a_plan(moestro, tmp_path):
    a_plan().save(tmp_path / "plan.json")
    done = moestro("show", tmp_path / "plan.json")
    assert done.code == 0 and a_plan().summary() in done.out and "models/tiny" in done.out
    assert moestro("show", tmp_path / "plan.json", "--json").json == json.loads(json.dumps(a_plan().to_json()))


def test_show_a_trace(moestro, trace):
    facts = moestro("show", trace, "--json").json
    assert (facts["tokens"], facts["prefill_tokens"], facts["sequences"], facts["steps"]) == (8, 2, 2, 4)
    always, turns = facts["layers"]
    assert always["counts"] == [0, 8, 0, 0] and always["used"] == 1 and always["balance"] == 0 and always["repeated"] == 1
    assert turns["counts"] == [2, 0, 6, 0]
    # within sequences: 0 2 0 2 repeats nothing, 2 2 2 2 repeats three times
    assert turns["repeated"] == 3 / 6
    assert turns["balance"] == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) / np.log(4))
    text = moestro("show", trace).out
    assert "·█··" in text and "8 tokens" in text


@pytest.mark.parametrize("content", [b"", b"not a trace at all", b'{"kind": "unheard of"}', None])
def test_show_refuses_other_files(moestro, tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    done = moestro("show", tmp_path / "x")
    assert done.code == 2 and done.out == "" and done.err.startswith("moestro: ")


def test_show_points_from_a_folder_to_inspect(moestro, tmp_path):
    done = moestro("show", tmp_path)
    assert done.code == 2 and "moestro inspect" in done.err


def test_diff(moestro, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    a_plan().save(one)
    a_plan().save(two)
    assert moestro("diff", one, two) == (0, "the plans are equal\n", "")
    replace(a_plan(), slots=(12,)).save(two)
    done = moestro("diff", one, two)
    assert done.code == 1 and "slots[0]" in done.out and "12" in done.out
    assert moestro("diff", one, two, "--json").json == {
        "equal": False,
        "differences": [{"field": "slots[0]", "first": 9, "second": 12}],
    }
    assert moestro("diff", one, tmp_path / "none.json").code == 2


def test_doctor(moestro, tmp_path):
    report = moestro("doctor", "--folder", tmp_path, "--json").json
    assert report["cores"] >= 1 and report["packages"]["numpy"] == np.__version__ and report["memory_available"] > 0
    assert report["disk_rate"] > 1e6 and report["memory_rate"] > 1e8
    assert list(tmp_path.iterdir()) == [], "the probe's file is gone"
    done = moestro("doctor", "--no-probe")
    assert done.code == 0 and report["kernels"]["level"] in done.out and "disk rate" not in done.out


def test_doctor_without_native_kernels_says_how_to_get_them(moestro, monkeypatch):
    monkeypatch.setattr("moestro.kernels.native.levels", lambda: ("numpy",))
    monkeypatch.setattr("moestro.kernels.native.level", lambda: "numpy")
    done = moestro("doctor", "--no-probe")
    assert done.code == 0 and "numpy" in done.out and "install a C++ compiler" in done.err


def test_doctor_says_that_kernels_are_held_back(moestro, monkeypatch):
    monkeypatch.setattr("moestro.kernels.native.levels", lambda: ("numpy", "scalar", "avx2"))
    monkeypatch.setattr("moestro.kernels.native.level", lambda: "scalar")
    report = moestro("doctor", "--no-probe", "--json").json
    assert report["kernels"] == {"level": "scalar", "levels": ["numpy", "scalar", "avx2"]}
    assert any("MOESTRO_KERNELS" in note and "avx2" in note for note in report["notes"])


def test_doctor_where_nothing_can_be_written(moestro):
    report = moestro("doctor", "--folder", "/proc", "--json").json
    assert report["disk_rate"] is None and any("not measured" in note for note in report["notes"])
