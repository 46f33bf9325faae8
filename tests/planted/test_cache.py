"""On a model whose sequences stay in a domain: live counts are replay's, and the planned policy is within two points of the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moestro.core.errors import BudgetError
from moestro.core.plans.residency import ResidencyPlan
from moestro.core.trace import Trace
from moestro.engine.engine import Engine
from moestro.engine.replay import pins_of, policies, replay
from moestro.engine.residency import plan_residency
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.testing.planted import Planted, sticky_model

PROMPT = 16
KNOWN = {"disk_rate": 1e9, "memory_rate": 1e10, "runtime_bytes": 0, "context": 512}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return sticky_model(tmp_path_factory.mktemp("sticky") / "model", layers=3, experts=16, groups=6, sequences=1, length=400)


def fed(planted: Planted, plan: ResidencyPlan) -> Engine:
    """An engine that has read the planted sequence: the first tokens as a prompt, the others one by one."""
    checkpoint = Checkpoint.open(planted.path)
    with Engine(checkpoint, describe(checkpoint), plan, threads=1, trace=True) as engine:
        engine.begin()
        tokens = planted.sequences[0]
        state = engine.trunk.start(1, len(tokens))
        engine.prefill(np.array([tokens[:PROMPT]], np.int64), state)
        for token in tokens[PROMPT:]:
            engine.decode(np.array([[token]], np.int64), state)
    return engine


def planned(planted: Planted, slots: int, trace: Trace | None = None) -> ResidencyPlan:
    """A plan whose budget holds exactly `slots` experts."""
    checkpoint = Checkpoint.open(planted.path)
    layout = describe(checkpoint)
    with pytest.raises(BudgetError) as caught:
        plan_residency(checkpoint, layout, 1, **KNOWN)
    assert caught.value.smallest is not None
    one = plan_residency(checkpoint, layout, caught.value.smallest, **KNOWN).memory.experts // layout.facts.layers[0].top_k
    budget = caught.value.smallest + (slots - layout.facts.layers[0].top_k) * one
    plan = plan_residency(checkpoint, layout, budget, trace=trace, chunk=32, **KNOWN)
    assert sum(plan.slots) == slots
    return plan


@pytest.mark.parametrize("slots", [5, 9, 14, 24])
def test_the_planned_policy_is_near_the_best_and_live_counts_are_its_replay(planted: Planted, slots: int) -> None:
    trace = fed(planted, planned(planted, 48)).trace()
    plan = planned(planted, slots, trace)
    engine = fed(planted, plan)
    table = engine.cache.table
    said = replay(
        engine.trace(),
        plan.slots,
        plan.scope,
        plan.eviction,
        eviction_options=plan.eviction_options,
        predictor=plan.predictor,
        predictor_options=plan.predictor_options,
        prefetch=plan.prefetch,
        pinned=plan.pinned,
    )
    assert (table.counts(prefill=True), table.counts(prefill=False)) == (said.prefill, said.decode)
    assert table.counts(prefill=False).hit_rate == said.hit_rate

    splits = {"global": (slots,)} | ({"layer": tuple(np.diff(np.arange(4) * slots // 3).tolist())} if slots >= 6 else {})
    rates = {
        (scope, name): replay(trace, split, scope, name, pinned=pins_of(name, trace, split, scope, {})).hit_rate
        for scope, split in splits.items()
        for name in policies()
    }
    assert said.hit_rate >= max(rates.values()) - 0.02, rates


def test_a_domains_experts_in_memory_hit_as_often_as_the_domain_stays(planted: Planted) -> None:
    plan = replace(planned(planted, 6), scope="layer", slots=(2, 2, 2), eviction="engine.evict.lru", prefetch=0)
    counts = fed(planted, plan).cache.table.counts(prefill=False)
    groups = planted.truth.group_V[np.array(planted.sequences[0])]
    stayed = float((groups[PROMPT:] == groups[PROMPT - 1 : -1]).mean())
    # What prefill leaves in memory need not be its last token's experts: the first decoded token may miss all the same.
    assert counts.hit_rate == pytest.approx(stayed, abs=1 / len(groups[PROMPT:]) + 1e-9) and 0.8 < stayed < 1
