"""Residency plans: how a budget is spent, what is refused, what replay chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moestro.core.errors import BudgetError, InputError, TraceError
from moestro.core.experts import ExpertSpec
from moestro.core.layer import LayerFacts, ModelFacts, RouterFacts
from moestro.core.plans.residency import ResidencyPlan
from moestro.engine.forecast import REPEATED, assumed_hit_rate
from moestro.engine.replay import LRU, NONE, Demands, pins_of, policies, replay
from moestro.engine.residency import MARGIN, TIE, decide, plan_residency
from moestro.engine.sizes import format_size, parse_size
from tests.engine.traces import cyclic, periodic, sticky, topics, trace_of, zipf

MIB = 1 << 20


def facts(layers=4, experts=12, top_k=2, expert_bytes=MIB, **changes) -> ModelFacts:
    spec = ExpertSpec(64, 32)
    rows = tuple(LayerFacts(i, i, experts, top_k, spec, RouterFacts("softmax"), expert_bytes=expert_bytes) for i in range(layers))
    fields = {"family": "toy", "dtype": "bfloat16", "vocabulary": 100, "d_model": 64, "decoder_layers": layers, "context": 4096}
    fields |= {
        "layers": rows,
        "trunk_bytes": 3 * MIB,
        "expert_bytes": layers * experts * expert_bytes,
        "kv_values_per_token": 512,
    }
    return ModelFacts(**(fields | {"fingerprint": "planted"} | changes))


RATES = {"disk_rate": 1e9, "memory_rate": 1e10}
SIZES = {"runtime_bytes": 10 * MIB, "trunk_bytes": 3 * MIB, "slot_bytes": MIB}


def make(memory, model=None, **more) -> ResidencyPlan:
    return decide("toy", model or facts(), memory=memory, **(SIZES | RATES | {"context": 256} | more))


def fixed(**more) -> int:
    """What everything but experts takes."""
    plan = make(2**32, **more)
    return plan.memory.total - plan.memory.experts


def with_slots(n, model=None, **more) -> ResidencyPlan:
    return make(fixed(chunk=32) + n * MIB, model, chunk=32, **more)


def test_a_plan_spends_its_budget_and_not_more():
    for memory in range(60 * MIB, 200 * MIB, 7 * MIB + 13):
        try:
            plan = make(memory)
        except BudgetError:
            continue
        m = plan.memory
        assert m.total <= memory and m.budget == memory
        assert m.experts == sum(plan.slots) * MIB
        assert sum(plan.slots) == 48 or memory - m.total < MIB, "a slot's worth was left over"
        plan.check(facts())
        assert ResidencyPlan.from_json(plan.to_json()) == plan


def test_plenty_of_memory_holds_every_expert():
    plan = make(2**33)
    assert plan.slots == (48,) and plan.scope == "global" and plan.chunk == 512
    assert plan.forecast is not None and plan.forecast.hit_rate == 1 and plan.forecast.missed_bytes_per_token == 0


@pytest.mark.parametrize("scope", [None, "global", "layer"])
def test_the_smallest_budget_is_named_and_works(scope):
    with pytest.raises(BudgetError) as error:
        make(MIB, scope=scope)
    smallest = error.value.smallest
    assert smallest is not None
    assert f"--memory {format_size(smallest)}" in str(error.value)
    plan = make(smallest, scope=scope)
    assert sum(plan.slots) == (8 if scope == "layer" else 2)
    assert make(parse_size(format_size(smallest)), scope=scope).slots
    with pytest.raises(BudgetError):
        make(smallest - 1, scope=scope)


def test_context_batch_and_dtype_cost_kv_cache():
    base = make(2**33)
    assert base.memory.kv_cache == 512 * 256 * 2
    assert make(2**33, context=512).memory.kv_cache == 2 * base.memory.kv_cache
    assert make(2**33, batch=3).memory.kv_cache == 3 * base.memory.kv_cache
    assert make(2**33, dtype="float32").memory.kv_cache == 2 * base.memory.kv_cache
    assert make(2**33, context=10**6).context == 4096
    assert base.memory.buffers > MARGIN


@pytest.mark.parametrize(
    "wrong",
    [
        {"scope": "all"},
        {"dtype": "int3"},
        {"batch": 0},
        {"context": -1},
        {"eviction": "belady"},
        {"predictor": "oracle"},
        {"eviction": "slru", "eviction_options": {"nonsense": 1}},
        {"eviction_options": {"protected": 0.5}},
        {"predictor_options": {"width": 3}},
        {"eviction": "pinned"},
    ],
)
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(InputError):
        make(2**30, **wrong)


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(TraceError):
        make(2**30, facts(fingerprint="other"), trace=sticky())


def test_without_a_trace_it_is_lru_with_slots_where_assumed_routing_wants_them():
    plan = with_slots(16)
    assert (plan.eviction, plan.predictor, sum(plan.slots), plan.inputs) == (LRU, "engine.predict.gate", 16, {})
    rates = {}
    for scope in ("global", "layer"):
        slots = (16,) if scope == "global" else (4, 4, 4, 4)
        rates[scope] = sum(assumed_hit_rate(facts(), scope, slots, LRU, repeated=p) for p in (0.0, REPEATED))
    assert rates[plan.scope] == max(rates.values()) and rates["layer"] != rates["global"]


def test_with_so_few_slots_that_lru_never_hits_it_is_not_lru():
    plan = with_slots(6)
    assert plan.eviction == "engine.evict.edgemoe" and plan.scope == "global"
    assert with_slots(7).eviction == LRU
    trace = sticky()
    assert replay(trace, (6,), "global", LRU).hit_rate == 0
    assert replay(trace, (6,), "global", plan.eviction).hit_rate > 0.1


def test_what_the_caller_chose_is_kept():
    plan = with_slots(
        16,
        scope="layer",
        eviction="slru",
        eviction_options={"protected": 0.5},
        predictor="previous",
        prefetch=1,
        trace=sticky(),
    )
    assert (plan.scope, plan.eviction, plan.eviction_options) == ("layer", "engine.evict.slru", {"protected": 0.5})
    assert (plan.predictor, plan.prefetch) == ("engine.predict.previous", 1)
    assert with_slots(16, predictor="previous").prefetch == 2, "top-k by default"
    assert with_slots(16, predictor="previous", prefetch=0).predictor == NONE


@pytest.mark.parametrize("slots", [8, 12, 24, 36])
@pytest.mark.parametrize(
    "trace",
    [
        sticky(),
        sticky(repeat=0.9, seed=5, prefill=40),
        zipf(layers=4, experts=12),
        zipf(layers=4, experts=12, power=2.0, seed=2),
        topics(layers=4),
        periodic(layers=4, experts=12),
    ],
    ids=["sticky", "very sticky", "zipf", "steep zipf", "topics", "periodic"],
)
def test_the_choice_is_within_two_points_of_the_best_in_replay(trace, slots):
    plan = with_slots(slots, trace=trace)
    asked = Demands(trace)
    found = replay(
        trace, plan.slots, plan.scope, plan.eviction, eviction_options=plan.eviction_options, pinned=plan.pinned, asked=asked
    )
    best = 0.0
    for name in policies():
        for scope, split in (("global", (slots,)), ("layer", (slots // 4,) * 4)):
            pins = pins_of(name, trace, split, scope)
            best = max(best, replay(trace, split, scope, name, pinned=pins, asked=asked).hit_rate)
    assert found.hit_rate >= best - TIE
    assert plan.inputs["trace"]


def test_ties_go_to_lru():
    trace = trace_of(sticky(tokens=30).experts_LTK, 12)
    assert with_slots(47, trace=trace).eviction == LRU


def test_a_cycle_is_no_place_for_lru():
    """One token repeats after 6 tokens and 5 of its 6 experts fit: LRU has no hit, others keep some."""
    plan = with_slots(20, facts(top_k=1, experts=6), trace=cyclic(layers=4))
    assert plan.eviction != LRU
    assert replay(cyclic(layers=4), plan.slots, plan.scope, plan.eviction, pinned=plan.pinned).hit_rate > 0.3


def test_a_predictor_is_chosen_only_if_it_pays():
    """Experts of successive layers follow each other exactly, and the cache alone is nearly useless."""
    import numpy as np

    rng = np.random.default_rng(0)
    tokens = np.stack([rng.choice(12, 2, replace=False) for _ in range(300)])
    experts = np.stack([(tokens + 5 * layer) % 12 for layer in range(4)])
    ahead = np.full((4, 300, 2), -1, np.int16)
    ahead[:-1] = experts[1:]
    trace = trace_of(experts, 12, ahead_LTK=ahead)
    slow = {"disk_rate": 1e9, "memory_rate": 1e9}
    plan = with_slots(8, trace=trace, **slow)
    assert plan.predictor == "engine.predict.gate" and plan.prefetch == 2
    assert with_slots(8, trace=trace, disk_rate=1e15, memory_rate=1e9).predictor == NONE, "reads cost nothing"
    wrong = sticky(ahead_LTK=rng.integers(0, 12, (4, 200, 2)).astype(np.int16))
    assert with_slots(24, trace=wrong, **slow).predictor == NONE, "nothing follows from the layer before"
    unknown = with_slots(24, trace=sticky(), **slow)
    assert (unknown.predictor, unknown.prefetch) == ("engine.predict.gate", 2), "the trace cannot say: found out while it runs"
    assert with_slots(48, trace=trace, **slow).predictor == NONE, "everything fits"


def test_the_forecast_is_a_band_that_faster_disks_raise():
    slow, fast = (with_slots(16, disk_rate=rate).forecast for rate in (1e8, 1e9))
    assert slow is not None and fast is not None
    assert 0 < slow.tokens_per_second_low < slow.tokens_per_second_high
    assert slow.tokens_per_second_low < fast.tokens_per_second_low
    assert slow.missed_bytes_per_token == pytest.approx((1 - slow.hit_rate) * 8 * MIB)
    more = with_slots(32).forecast
    assert more is not None and more.hit_rate > fast.hit_rate


def test_the_forecast_follows_the_trace():
    trace = sticky(repeat=0.95)
    plan = with_slots(16, trace=trace, predictor="none")
    found = replay(trace, plan.slots, plan.scope, plan.eviction, pinned=plan.pinned, expert_bytes=[MIB] * 4)
    assert plan.forecast is not None
    assert plan.forecast.hit_rate == found.decode.hit_rate
    assert plan.forecast.missed_bytes_per_token == found.missed_bytes_per_token()


def test_assumed_hit_rates_agree_with_known_ones():
    """OLMoE's shape, 16 layers x 64 experts, top 8: LRU 70 / 41 / 13 % uniform, 87 / 74 / 62 % at 60 % repeated."""
    olmoe = facts(layers=16, experts=64, top_k=8)
    for slots, uniform, repeated in ((768, 70, 87), (512, 41, 74), (256, 13, 62)):
        assert 100 * assumed_hit_rate(olmoe, "global", (slots,), LRU, repeated=0.0) == pytest.approx(uniform, abs=12)
        assert 100 * assumed_hit_rate(olmoe, "global", (slots,), LRU, repeated=0.6) == pytest.approx(repeated, abs=6)


def test_more_slots_than_experts_fails_the_check():
    from moestro.core.errors import PlanError

    plan = with_slots(16)
    with pytest.raises(PlanError, match="slots"):
        replace(plan, slots=(49,)).check(facts())


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2**31), ("12GB", 12 * 10**9), ("500M", 5 * 10**8), ("1.5 kib", 1536), ("77", 77), (4096, 4096)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


def test_shares_need_a_whole():
    assert parse_size("50%", 200) == 100
    for wrong in ("50%", "-1", "0", "GiB", "2 giga", "", "1e9", "5%B"):
        with pytest.raises(InputError):
            parse_size(wrong)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 2480343613, 2**40 + 1, 2**31, 10**15 + 7])
def test_a_written_size_is_never_too_small(size):
    assert size <= parse_size(format_size(size)) <= size * 1.01 + 16
    assert format_size(2480343613) == "2.31GiB"


def test_a_checkpoint_is_planned_from_its_headers(tiny, opened):
    folder, _ = tiny("olmoe")
    checkpoint, layout = opened(folder)
    given = {"runtime_bytes": 100 * MIB + 1, "disk_rate": 1e9, "memory_rate": 1e10}
    plan = plan_residency(checkpoint, layout, "1GiB", **given)
    assert plan.memory.budget == 2**30 and plan.memory.runtime == 104 * MIB
    assert plan.memory.trunk == layout.facts.trunk_bytes
    assert plan.slots == (sum(la.num_experts for la in layout.facts.layers),)
    assert plan.subjects[0].fingerprint == layout.facts.fingerprint
    assert plan_residency(checkpoint, layout, "1GiB", dtype="bfloat16", **given).memory.trunk == layout.facts.trunk_bytes // 2
    packed = plan_residency(checkpoint, layout, "1GiB", codec="bf16", **given)
    assert packed.codec == "bf16" and packed.memory.experts <= plan.memory.experts
    measured = plan_residency(checkpoint, layout, "4GiB")
    assert measured.forecast is not None and measured.forecast.disk_rate > 0 and measured.forecast.memory_rate > 1e8
    with pytest.raises(BudgetError) as error:
        plan_residency(checkpoint, layout, "1MiB", **given)
    assert error.value.smallest is not None
    assert plan_residency(checkpoint, layout, error.value.smallest, **given).slots == (4,)
