import subprocess
import sys

import numpy as np
import pytest

from moestro.core.errors import BudgetError, InputError, PlanError
from moestro.core.layer import Runner
from moestro.engine import memory
from moestro.engine.engine import Engine
from moestro.engine.pack import pack
from moestro.engine.sample import SamplingParams
from moestro.engine.store import PackedStore

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 30)]
RATES = {"disk_rate": 1e9, "memory_rate": 1e10}  # given, so that nothing is probed
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def budget() -> int:
    return memory.runtime_bytes() + (64 << 20)


def test_open_within_a_budget(tiny, engine, budget):
    folder, _ = tiny("mixtral")
    with Engine.open(folder, memory=budget, threads=1, **RATES) as made:
        assert isinstance(made, Runner)
        assert made.plan.memory.total <= budget
        assert made.generate(TOKENS, GREEDY).run()[0].tokens == engine(folder).generate(TOKENS, GREEDY).run()[0].tokens


def test_open_without_a_budget_takes_what_is_available(tiny):
    with Engine.open(tiny("mixtral")[0], threads=1, **RATES) as made:
        assert made.plan.slots == (sum(la.num_experts for la in made.facts.layers),)


def test_a_plan_is_the_whole_instruction(tiny, opened, make_plan):
    folder, _ = tiny("mixtral")
    plan = make_plan(opened(folder)[1], "minimal")
    with Engine.open(folder, plan=plan, threads=1) as made:
        assert made.plan is plan
    with pytest.raises(InputError, match="a plan is given and also memory, context"):
        Engine.open(folder, plan=plan, memory=1 << 30, context=10)


def test_a_budget_that_is_too_small_names_the_smallest(tiny, engine):
    folder, _ = tiny("mixtral")
    with pytest.raises(BudgetError) as caught:
        Engine.open(folder, memory=100 << 20, threads=1, **RATES)
    smallest = caught.value.smallest
    assert smallest is not None
    runtime = memory.runtime_bytes(torch=False)
    with Engine.open(folder, memory=smallest + (8 << 20), runtime_bytes=runtime, threads=1, **RATES) as made:
        assert len(made.generate(TOKENS, GREEDY).run()[0].tokens) == 6


def test_packed_experts_and_plans_must_agree(tmp_path, tiny, opened, make_plan, budget):
    folder, _ = tiny("mixtral", hidden_size=64, intermediate_size=64)
    checkpoint, layout = opened(folder)
    packed = pack(checkpoint, layout, "int8:32", tmp_path / "p")
    with Engine.open(folder, memory=budget, store=packed, threads=1, **RATES) as made:
        assert isinstance(made.store, PackedStore) and made.plan.codec == "int8:32"
        generation = made.generate(TOKENS, GREEDY)
        generation.run()
        assert generation.statistics is not None and not generation.statistics.exact
    with pytest.raises(PlanError, match="int8:32"):
        Engine.open(folder, plan=make_plan(layout), store=packed, threads=1)
    with pytest.raises(InputError, match="no packed experts"):
        Engine.open(folder, plan=make_plan(layout, codec="int8:32"), threads=1)


def test_prompts_are_planned_whole_where_states_may_not_continue(tiny, budget):
    with Engine.open(tiny("jamba")[0], memory=budget, context=200, threads=1, **RATES) as made:
        assert made.plan.chunk == 200
    with Engine.open(tiny("gpt_oss")[0], memory=budget, context=100, chunk=32, threads=1, **RATES) as made:
        assert made.plan.chunk == 32


def test_a_trace_has_to_be_asked_for(tiny, engine):
    with pytest.raises(InputError, match="trace=True"):
        engine(tiny("mixtral")[0]).trace()


def test_trace_survives_saving(tmp_path, tiny, engine):
    from moestro.core.trace import Trace

    made = engine(tiny("qwen3_moe")[0], trace=True, chunk=16, predictor="engine.predict.gate", prefetch=2)
    made.generate(TOKENS, GREEDY).run()
    made.trace().save(tmp_path / "t")
    again = Trace.open(tmp_path / "t")
    again.check_model(made.facts.fingerprint)
    assert [(s.prefill, s.rows.stop - s.rows.start) for s in again.steps()] == [(True, 16), (True, 14)] + [(False, 1)] * 5
    np.testing.assert_array_equal(again.tokens_T[:30], TOKENS)
    assert again.ahead_LTK is not None


def test_a_sequence_beyond_the_context_is_refused(tiny, engine):
    made = engine(tiny("mixtral")[0])
    with pytest.raises(InputError, match="300 tokens"):
        next(made.run([[3] * 300]))


def test_the_engine_is_imported_without_torch():
    code = "import sys, moestro.engine.engine, moestro.engine.pack, moestro.engine.residency; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
