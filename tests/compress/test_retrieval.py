"""Task-adaptive retrieval on a planted model of three domains: a query finds its task, and only that task's experts are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.compress.executor import compress
from moestro.compress.retrieval import retrieval
from moestro.core.errors import InputError, PlanError
from moestro.core.plan import read_plan
from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot
from moestro.core.plans.tasks import TaskPlan, pattern
from moestro.engine.engine import Engine
from moestro.engine.sample import SamplingParams
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.planted import domain_model
from tests.compress.conftest import subject

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def profiled(model, sequences):
    texts = cut([Document("all", str(i), tokens=list(s)) for i, s in enumerate(sequences)], None, length=48)
    recording = Recording(model, texts, make({"counts": {}, "selection": {"first": 2}}))
    recording.run(model)
    return recording.profile()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    torch.set_num_threads(1)
    made = domain_model(
        tmp_path_factory.mktemp("tasks") / "model",
        experts_per_domain=3,
        idle=3,
        tokens_per_domain=6,
        d_expert=8,
        length=24,
        sequences=9,
    )
    model = open_model(made.path)
    groups = [[s for s in made.sequences if made.truth.group_V[s[0]] == g] for g in range(3)]
    profiles = [(f"domain {g}", profiled(model, own[:1])) for g, own in enumerate(groups)]
    return made, describe(Checkpoint.open(made.path)).facts, profiles, groups


def plan_of(planted, keep: int = 3) -> TaskPlan:
    made, facts, profiles, _ = planted
    return retrieval(profiles, facts, str(made.path), keep=keep)


def test_a_task_keeps_its_domain(planted, tmp_path):
    made, _, _, _ = planted
    plan = plan_of(planted)
    for g, task in enumerate(plan.tasks):
        for layer, ids in enumerate(task.kept):
            assert set(ids) == made.truth.domain_experts(g, layer)
    plan.save(tmp_path / "tasks.json")
    assert read_plan(tmp_path / "tasks.json") == plan and plan.first == 2


def test_a_task_keeps_super_experts_of_any_profile(planted):
    _, facts, profiles, _ = planted
    plan = plan_of(planted)
    e = next(e for e in range(facts.layers[0].num_experts) if e not in plan.tasks[0].kept[0])
    most_LE = np.ones((len(facts.layers), facts.layers[0].num_experts))
    most_LE[0, e] = 1e4
    name, last = profiles[-1]
    seen = [*profiles[:-1], (name, replace(last, arrays={**last.arrays, "output_most_LE": most_LE}))]
    assert e in retrieval(seen, facts, "m", keep=3).tasks[0].kept[0]
    assert retrieval(seen, facts, "m", keep=3, protect=False).tasks == plan.tasks
    with pytest.raises(InputError, match="99 experts"):
        retrieval(profiles, facts, "m", keep=99)


@pytest.mark.parametrize("trunk", ["native", "transformers"])
def test_a_query_loads_its_task_alone(planted, trunk):
    made, _, _, groups = planted
    plan = plan_of(planted)
    with (
        Engine.open(made.path, threads=1, tasks=plan, trunk=trunk) as engine,
        Engine.open(made.path, threads=1, trunk=trunk) as whole,
    ):
        for g, own in enumerate(groups):
            for query in own[1:]:
                generation = engine.generate([query[:8]], GREEDY, text=False)
                answer = generation.run()[0].tokens
                assert engine.task == f"domain {g}", "held-out queries find their task"
                told = generation.statistics
                assert told is not None and not told.exact and f"domain {g}" in told.summary()
                assert answer == whole.generate([query[:8]], GREEDY, text=False).run()[0].tokens, "its own domain loses nothing"
        engine.cache.forget()
        before = set(engine.cache.views)
        engine.generate([groups[1][1][:8]], GREEDY, text=False).run()
        read = {(k.layer, k.expert) for k in set(engine.cache.views) - before}
        assert not before and read <= {(i, e) for i, ids in enumerate(plan.tasks[1].kept) for e in ids}


def test_another_tasks_experts_are_worse(planted):
    made, _, _, groups = planted
    plan = plan_of(planted)
    ids = groups[0][1]
    with Engine.open(made.path, threads=1) as engine:
        whole = next(iter(engine.run([ids]))).logits_TV
        wrong = {}
        for g in (0, 1):
            engine.trunk.restrict(plan.tasks[g].kept)
            wrong[g] = float(np.abs(next(iter(engine.run([ids]))).logits_TV - whole).max())
        engine.trunk.restrict(plan_of(planted, keep=12).tasks[1].kept)
        assert np.array_equal(next(iter(engine.run([ids]))).logits_TV, whole), "all experts open: nothing changes"
    assert wrong[0] < 1e-4 < 0.1 < wrong[1]


def test_a_restricted_model_is_the_model_of_its_experts(saved, tmp_path):
    """The same logits as a checkpoint that holds those experts alone."""
    one, kept = saved("mixtral"), (1, 2, 3)
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in kept)) for la in one.layout.facts.layers)
    compress(
        CompressionPlan(subjects=subject(one), method="by.hand", layers=layers), one.checkpoint, one.layout, tmp_path / "out"
    )
    ids = [list(range(5, 25))]
    want = next(iter(open_model(tmp_path / "out").run(ids))).logits_TV.numpy()
    for trunk in ("native", "transformers"):
        with Engine.open(one.folder, threads=1, trunk=trunk) as engine:
            engine.trunk.restrict([kept] * len(layers))
            np.testing.assert_allclose(next(iter(engine.run(ids))).logits_TV, want, atol=3e-5)
            answer = engine.generate(ids, GREEDY, text=False).run()[0].tokens
        with Engine.open(tmp_path / "out", threads=1, trunk=trunk) as small:
            assert answer == small.generate(ids, GREEDY, text=False).run()[0].tokens


def test_patterns_by_hand():
    logits = np.array([[3.0, 1.0, -1.0], [-4.0, -2.0, -3.0]])
    assert np.allclose(pattern(logits, 1, None, True), [1.5, 0, 0])
    assert np.allclose(pattern(logits, 1, None, False), [1.5, -1.0, 0])
    soft = np.exp([3.0, 1.0]) / np.exp([3.0, 1.0]).sum()
    assert np.allclose(pattern(logits, 2, 0.0, True), [soft[0] / 2, soft[1] / 2, 0])


def test_what_cannot_be(planted, tmp_path):
    made, facts, profiles, groups = planted
    with pytest.raises(InputError, match="two tasks"):
        retrieval(profiles[:1], facts, "m", keep=3)
    with pytest.raises(PlanError, match="keeps 1"):
        retrieval(profiles, facts, "m", keep=1)
    with Engine.open(made.path, threads=1, tasks=plan_of(planted)) as engine, pytest.raises(InputError, match="one prompt"):
        engine.generate([groups[0][0][:4], groups[1][0][:4]], GREEDY, text=False)
    text = Path(tmp_path / "x.json")
    text.write_text("{}")
    with pytest.raises(PlanError):
        read_plan(text)
