"""Compression plans: JSON round trip by hand-editable fields, and what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moestro.core.errors import PlanError
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import LayerFacts, ModelFacts, RouterFacts
from moestro.core.plan import Subject, read_plan
from moestro.core.plans.compression import CompressionPlan, Encoding, Judged, LayerChange, Row, Slot


def facts_of(router: RouterFacts = RouterFacts("softmax"), experts: int = 8, top_k: int = 2) -> ModelFacts:  # noqa: B008
    layers = tuple(LayerFacts(i, i + 1, experts, top_k, ExpertSpec(16, 4), router, expert_bytes=3072) for i in range(2))
    return ModelFacts("tiny", "float32", 100, 16, 4, 128, layers, 10_000, 2 * experts * 3072, 64, "a" * 64)


def kept(*experts: int) -> LayerChange:
    return LayerChange(0, tuple(Slot((e,)) for e in experts))


@pytest.fixture
def plan() -> CompressionPlan:
    merged = Slot((4, 1), (0.75, 0.25), ((), (2, 0, 1, 3)), (0, 3), (0,))
    first = LayerChange(0, (Slot((0,)), merged, Slot((7,), encodings=(0, 1))), loss=0.5)
    second = LayerChange(1, (Slot((3,)), Slot((5,))), (Row(0, (3,)), Row(1, (5, 6), (0.5, 0.5)), Row(0, (2,))))
    return CompressionPlan(
        subjects=(Subject("models/tiny", "a" * 64),),
        method="compress.criterion.a",
        options={"ratio": 0.5},
        layers=(first, second),
        encodings=(Encoding("compress.encode.a"), Encoding("compress.encode.b", "int4:64", {"damp": 0.1}, True)),
        tensors={"lm_head.weight": (1,)},
        dropped=("model.layers.4.*",),
        protected=(ExpertKey(0, 7),),
        stated=("2 experts were never seen",),
        sizes=(100, 50),
        loss_unit="share of the weighted norms",
        judged=(Judged("text", 10, 5.0, 4.0, 0.1, 0.01, 0.9),),
    )


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["layers"][0]["slots"][0] == {"sources": [0]}, "what is usual is not written"
    assert written["encodings"][0] == {"method": "compress.encode.a"} and written["encodings"][1]["chained"] is True
    plan.check(facts_of())


def test_summary(plan):
    text = plan.summary()
    for part in ("2 MoE layers of 2 to 3 experts, 1 of them merged", "50.0 %", "(int4:64) on 1 experts and 1 other", "layer 0 expert 7",
                 "never seen", "+25.00 %", "KL 0.1000", "90.0 %"):  # fmt: skip
        assert part in text, part


def test_difference(plan):
    other = replace(plan, layers=(replace(plan.layers[0], slots=(Slot((2,)), *plan.layers[0].slots[1:])), plan.layers[1]))
    assert plan.diff(other) == [("layers[0].slots[0].sources[0]", 0, 2)]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((kept(0, 1, 2),), "each of the model's 2 once"),
        ((kept(0), replace(kept(0), ordinal=1)), "2 are used per token"),
        ((kept(0, 1, 2), replace(kept(0, 1), ordinal=1)), "2 to 3 experts"),
        ((kept(0, 8), replace(kept(0, 1), ordinal=1)), "experts 0 to 7"),
        ((LayerChange(0, (Slot((0,)), Slot((1, 2)))), replace(kept(0, 1), ordinal=1)), "no coefficients"),
        ((LayerChange(0, (Slot((0,)), Slot((1,), (float("nan"),)))), replace(kept(0, 1), ordinal=1)), "not numbers"),
        ((LayerChange(0, (Slot((0,)), Slot((1,), (), ((0, 0, 1, 2),)))), replace(kept(0, 1), ordinal=1)), "no order"),
        ((LayerChange(0, (Slot((0,)), Slot((1,), neurons=(3, 1)))), replace(kept(0, 1), ordinal=1)), "out of order"),
        ((LayerChange(0, (Slot((0,)), Slot((1,), neurons=(0, 4)))), replace(kept(0, 1), ordinal=1)), "not there"),
        ((LayerChange(0, (Slot((0,)), Slot((1,), encodings=(0,)))), replace(kept(0, 1), ordinal=1)), "the plan has 0"),
        ((LayerChange(0, kept(0, 1).slots, (Row(0, (0,)), Row(0, (1,)))), replace(kept(0, 1), ordinal=1)), "leads to slot 1"),
        ((kept(0, 5, 0), replace(kept(0, 1, 2), ordinal=1)), "slots 0 and 2 would both keep the router's row of expert 0"),
    ],
)
def test_refused(layers, said):
    with pytest.raises(PlanError, match=said):
        CompressionPlan(subjects=(Subject("m", "a" * 64),), method="m", layers=layers).check(facts_of())


def test_an_expert_may_be_in_two_slots_where_the_rows_say_what_leads_to_them():
    rows = (Row(0, (0,)), Row(1, (5,)), Row(2, (3,)))
    layers = (replace(kept(0, 5, 0), rows=rows), replace(kept(0, 1, 2), ordinal=1))
    CompressionPlan(subjects=(Subject("m", "a" * 64),), method="m", layers=layers).check(facts_of())


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        ((0, 1, 4), "in 4 groups"),
        ((0, 2, 4, 6), "at least two"),
        ((1, 0, 2, 3, 4, 5, 7, 6), None),
        ((0, 1, 4, 5, 2, 3, 6, 7), "change their group"),
    ],
)
def test_groups(experts, said):
    layers = (kept(*experts), replace(kept(*experts), ordinal=1))
    plan = CompressionPlan(subjects=(Subject("m", "a" * 64),), method="m", layers=layers)
    facts = facts_of(RouterFacts("sigmoid", groups=4, groups_kept=2, selection_bias=True))
    if said is None:
        plan.check(facts)
    else:
        with pytest.raises(PlanError, match=said):
            plan.check(facts)


def test_another_model(plan):
    with pytest.raises(PlanError, match="was made for"):
        replace(plan, subjects=(Subject("m", "b" * 64),)).check(facts_of())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["layers"][0].update(surprise=1),
        lambda d: d["layers"][0]["slots"][0].update(surprise=1),
        lambda d: d["layers"][0]["slots"][0].update(sources=["a"]),
        lambda d: d.update(sizes=[1]),
        lambda d: d.update(protected=[[1]]),
        lambda d: d["encodings"][0].update(chained="no"),
    ],
)
def test_a_damaged_plan_is_refused(plan, tmp_path, change):
    data = json.loads(json.dumps(plan.to_json()))
    change(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError):
        read_plan(tmp_path / "plan.json")
