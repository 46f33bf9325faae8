"""Plans: JSON round trip, differences, and checks against the model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moestro.core.errors import PlanError, StorageError
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import LayerFacts, ModelFacts, RouterFacts
from moestro.core.plan import Subject, read_plan
from moestro.core.plans.residency import Forecast, Memory, ResidencyPlan

GIB = 1024**3


@pytest.fixture
def facts() -> ModelFacts:
    spec, router = ExpertSpec(16, 32), RouterFacts("softmax")
    layers = tuple(LayerFacts(i, i + 1, 8, 2, spec, router, expert_bytes=3072) for i in range(3))
    return ModelFacts("tiny", "F32", 100, 16, 4, 128, layers, 10_000, 3 * 8 * 3072, 64, "a" * 64)


@pytest.fixture
def plan() -> ResidencyPlan:
    return ResidencyPlan(
        subjects=(Subject("models/tiny", "a" * 64),),
        method="a.method",
        options={"share": 0.5},
        inputs={"trace": "0" * 64},
        memory=Memory(2 * GIB, 1, 2, 3, 4, 5),
        scope="layer",
        slots=(4, 3, 2),
        eviction="an.eviction",
        predictor="a.predictor",
        eviction_options={"ratio": 0.8},
        pinned=(ExpertKey(0, 7), ExpertKey(2, 1)),
        forecast=Forecast(1.5, 2.5, 0.75, 1e6, 1e9, 2e10),
    )


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "deep" / "plan.json")
    read = read_plan(tmp_path / "deep" / "plan.json")
    assert read == plan and type(read) is ResidencyPlan
    assert isinstance(read.pinned[0], ExpertKey) and isinstance(read.memory, Memory) and read.memory.total == 15
    assert ResidencyPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert replace(plan, forecast=None) == ResidencyPlan.from_json(json.loads(json.dumps(replace(plan, forecast=None).to_json())))


def test_summary_tells_the_budget_and_the_policies(plan):
    text = plan.summary()
    assert (
        "2.00 GiB" in text
        and "an.eviction" in text
        and "a.predictor" in text
        and "1.5-2.5 tokens/s" in text
        and "75 % hits" in text
    )


def test_diff_is_empty_for_equals_and_names_each_field(plan):
    assert plan.diff(plan) == []
    other = replace(plan, slots=(4, 4, 2), eviction="another", eviction_options={"ratio": 0.8, "more": 1})
    assert plan.diff(other) == [
        ("slots[1]", 3, 4),
        ("eviction", "an.eviction", "another"),
        ("eviction_options.more", None, 1),
    ]
    assert [(at, b, a) for at, a, b in other.diff(plan)] == plan.diff(other)


def test_check_passes(plan, facts):
    plan.check(facts)
    replace(plan, scope="global", slots=(9,)).check(facts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subjects": (Subject("other", "b" * 64),)}, "was made for other"),
        ({"scope": "wide"}, "scope"),
        ({"scope": "global", "slots": (1,)}, "from 2 to 24"),
        ({"scope": "global", "slots": (25,)}, "from 2 to 24"),
        ({"scope": "global", "slots": (4, 4, 4)}, "from 2 to 24"),
        ({"slots": (4, 4)}, "slots per layer"),
        ({"slots": (4, 1, 4)}, "slots per layer"),
        ({"slots": (4, 9, 4)}, "slots per layer"),
        ({"pinned": (ExpertKey(3, 0),)}, "does not exist"),
        ({"pinned": (ExpertKey(0, 8),)}, "does not exist"),
        ({"pinned": (ExpertKey(0, -1),)}, "does not exist"),
    ],
)
def test_check_refuses(plan, facts, change, said):
    with pytest.raises(PlanError, match=said):
        replace(plan, **change).check(facts)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(moestro_plan=2),
        lambda d: d.update(kind="other"),
        lambda d: d.update(surprise=1),
        lambda d: d.pop("memory"),
        lambda d: d.pop("slots"),
        lambda d: d.update(memory={"budget": 1}),
        lambda d: d.update(slots=["many"]),
        lambda d: d.update(subjects=[{"path": "x"}]),
    ],
)
def test_a_damaged_plan_is_refused(plan, tmp_path, change):
    data = json.loads(json.dumps(plan.to_json()))
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "plan.json")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '{"kind": []}'])
def test_a_file_that_is_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError):
        read_plan(tmp_path / "plan.json")


def test_no_file_and_no_room(plan, tmp_path):
    with pytest.raises(PlanError, match="there is no plan"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        plan.save(tmp_path / "file" / "plan.json")


def test_active_bytes(facts):
    assert facts.active_expert_bytes == 3 * 2 * 3072
