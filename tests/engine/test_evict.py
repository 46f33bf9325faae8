"""Eviction policies against closed forms, brute force and planted traces."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from moestro.core.experts import ExpertKey
from moestro.engine.evict.arc import Arc
from moestro.engine.evict.edgemoe import EdgeMoe
from moestro.engine.evict.heap import ScoreHeap
from moestro.engine.evict.lfu import Lfu
from moestro.engine.evict.pinned import Pinned
from moestro.engine.evict.slru import Slru
from moestro.engine.replay import BELADY, Demands, replay
from moestro.engine.table import Moment, SlotTable
from tests.engine.traces import cyclic, sticky, topics, trace_of, zipf


def rate(trace, slots, eviction, **options):
    return replay(trace, (slots,), "global", f"engine.evict.{eviction}", eviction_options=options).hit_rate


def drive(table, layer, experts, step):
    for _ in table.waves([ExpertKey(layer, e) for e in experts], Moment(step, layer, False)):
        pass


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_lru_has_no_hit_on_a_cycle_one_longer_than_the_cache(slots):
    assert rate(cyclic(experts=slots + 1), slots, "lru") == 0


def test_belady_on_a_cycle_is_the_closed_form():
    """Cycle of n, c slots: once warm, c - 1 of every n - 1 demands hit."""
    n, c, tokens = 6, 4, 6 + 5 * 40
    report = replay(cyclic(tokens=tokens, experts=n), (c,), "global", BELADY)
    assert report.decode.hits == pytest.approx((tokens - n) * (c - 1) / (n - 1), abs=n)


@pytest.mark.parametrize("seed", range(8))
def test_belady_equals_the_best_of_all_decisions(seed):
    rng = np.random.default_rng(seed)
    experts, slots, capacity = 5, int(rng.integers(1, 3)), int(rng.integers(2, 5))
    steps = [frozenset(rng.choice(experts, slots, replace=False).tolist()) for _ in range(9)]
    trace = trace_of([[sorted(s) for s in steps]], experts)

    @functools.cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(steps):
            return 0
        need = steps[at]
        rest = sorted(held - need)
        keep = min(len(rest), capacity - len(need))
        return len(held & need) + max(best(at + 1, need | frozenset(some)) for some in itertools.combinations(rest, keep))

    assert replay(trace, (capacity,), "global", BELADY).decode.hits == best(0, frozenset())


@pytest.mark.parametrize("prefill", [0, 40])
def test_lru_never_loses_hits_by_more_slots(prefill):
    """The stack property, simulated (Slru without a protected part is LRU, without the shortcut)."""
    trace = sticky(prefill=prefill, passes=2)
    most = max(Demands(trace).largest)
    hits = [rate(trace, slots, "slru", protected=0.0) for slots in range(most, 49)]
    assert hits == sorted(hits)


def test_lfu_keeps_the_popular_experts():
    trace = zipf(power=1.5)
    assert rate(trace, 16, "lfu") > rate(trace, 16, "lru") + 0.05


def test_a_half_life_forgets_an_old_topic():
    trace = topics(layers=2, tokens=400, experts=12, change=200)
    assert rate(trace, 12, "lfu", half_life=20.0) > rate(trace, 12, "lfu") + 0.05


def test_a_half_life_halves():
    """Two uses long ago weigh as much as one use a half-life later; then the older one leaves."""
    policy = Lfu(4, 1, half_life=10.0)
    old, new = ExpertKey(0, 0), ExpertKey(0, 1)
    policy.insert(old, Moment(0, 0, False))
    policy.touch(old, Moment(0, 0, False))
    policy.insert(new, Moment(10, 0, False))
    assert policy.victim((), Moment(10, 0, False), ExpertKey(0, 2)) == old
    policy.touch(old, Moment(10, 0, False))
    assert policy.victim((), Moment(10, 0, False), ExpertKey(0, 2)) == new


def test_lfu_remembers_far_steps():
    policy = Lfu(4, 1, half_life=1.0)
    for step in (0, 100_000):
        policy.insert(ExpertKey(0, step > 0), Moment(step, 0, False))
    assert policy.victim((), Moment(100_000, 0, False), ExpertKey(0, 2)) == ExpertKey(0, 0)


def test_slru_without_protection_is_lru():
    for seed in range(3):
        trace = sticky(seed=seed)
        for slots in (8, 13, 24):
            assert rate(trace, slots, "slru", protected=0.0) == rate(trace, slots, "lru")


@pytest.mark.parametrize("policy", [Slru, Arc])
def test_a_scan_does_not_flush_what_is_used_again(policy):
    table = SlotTable([10], "global", policy, layers=1)
    for step in range(4):
        drive(table, 0, [0, 1, 2, 3], step)
    for step in range(10, 40):
        drive(table, 0, [step], step)
    assert {ExpertKey(0, e) for e in range(4)} <= set(table.residents())


@pytest.mark.parametrize("policy", [Slru, Arc])
def test_the_first_use_of_a_prefetched_expert_is_no_second_use(policy):
    table = SlotTable([4], "global", policy, layers=1)
    table.hint([ExpertKey(0, 0)], Moment(0, 0, False))
    drive(table, 0, [0], 0)
    for step in range(1, 5):
        drive(table, 0, [step], step)
    assert ExpertKey(0, 0) not in table.residents()


@pytest.mark.parametrize("seed", range(5))
def test_arc_keeps_its_invariants(seed):
    rng = np.random.default_rng(seed)
    c = int(rng.integers(2, 12))
    table = SlotTable([c], "global", Arc, layers=2)
    for step in range(300):
        for layer in (0, 1):
            p = 1.0 / (1 + np.arange(20)) ** rng.choice([0.0, 1.0])
            experts = rng.choice(20, rng.integers(1, c + 1), replace=False, p=p / p.sum()).tolist()
            drive(table, layer, experts, step)
            table.hint([ExpertKey(1 - layer, int(rng.integers(20)))], Moment(step, layer, False))
            arc = table.policy()
            assert isinstance(arc, Arc)
            t1, t2, b1, b2 = arc.sizes
            assert t1 + t2 == len(table) <= c
            assert t1 + b1 <= c and t1 + t2 + b1 + b2 <= 2 * c
            assert 0 <= arc._target <= c


def test_arc_gives_recency_room_when_it_regrets():
    arc = Arc(2, 1)
    now = Moment(0, 0, False)
    a, b, c = (ExpertKey(0, e) for e in range(3))
    arc.insert(a, now)
    arc.touch(a, now)
    arc.insert(b, now)
    assert arc.victim((), now, c) == b
    arc.remove(b)
    arc.insert(c, now)
    assert arc.victim((), now, b) == a, "b was let go too early: now frequency gives way"


def test_edgemoe_spares_the_next_layer():
    """Of equally frequent experts one of the next layer never leaves before one of the layer just run."""
    layers = 6
    for now in range(layers):
        policy = EdgeMoe(layers, layers)
        for layer in range(layers):
            policy.insert(ExpertKey(layer, 0), Moment(0, layer, False))
        order = []
        while len(order) < layers:
            victim = policy.victim((), Moment(1, now, False), ExpertKey(now, 9))
            policy.remove(victim)
            order.append(victim.layer)
        assert order == [(now - i) % layers for i in range(layers)], "the layer just run first, the next one last"


def test_edgemoe_weighs_frequency_by_distance():
    policy = EdgeMoe(4, 4)
    near, far = ExpertKey(1, 0), ExpertKey(3, 0)
    policy.insert(near, Moment(0, 1, False))
    for _ in range(4):
        policy.insert(far, Moment(0, 3, False))
    now = Moment(1, 0, False)
    assert policy.victim((), now, ExpertKey(0, 0)) == near, "1 / 1 < 4 / 3"
    policy.touch(near, Moment(1, 1, False))
    assert policy.victim((), now, ExpertKey(0, 0)) == far, "4 / 3 < 2 / 1"
    assert policy.victim({far}, now, ExpertKey(0, 0)) == near


def test_edgemoe_agrees_with_a_plain_search():
    rng = np.random.default_rng(0)
    policy, uses, stamp, clock = EdgeMoe(30, 5), {}, {}, itertools.count()
    resident: set[ExpertKey] = set()
    for step in range(2000):
        key = ExpertKey(int(rng.integers(5)), int(rng.integers(12)))
        now = Moment(step, int(rng.integers(5)), False)
        if key not in resident and len(resident) == 20:
            busy = set(sorted(resident)[:3]) if step % 2 else set()

            def value(k, now=now):
                d = (k.layer - now.layer) % 5 or 5
                return uses[k] / d, -d, stamp[k]

            expected = min((k for k in resident if k not in busy), key=value)
            assert policy.victim(busy, now, key) == expected
            policy.remove(expected)
            resident.remove(expected)
        uses[key], stamp[key] = uses.get(key, 0) + 1, next(clock)
        (policy.touch if key in resident else policy.insert)(key, now)
        resident.add(key)


def test_pins_are_the_most_frequent_and_leave_room():
    counts = np.array([[9, 1, 5, 0], [2, 8, 0, 0]])
    assert Pinned.pins(counts, (6,), "global", [2, 2], share=0.5) == tuple(ExpertKey(*k) for k in ((0, 0), (1, 1), (0, 2)))
    assert Pinned.pins(counts, (3,), "global", [2, 2], share=1.0) == (ExpertKey(0, 0),)
    assert Pinned.pins(counts, (3, 4), "layer", [2, 1], share=1.0) == (ExpertKey(0, 0), ExpertKey(1, 1), ExpertKey(1, 0))
    assert Pinned.pins(np.zeros((2, 4)), (6,), "global", [2, 2], share=1.0) == ()


def test_the_heap_survives_many_changes():
    rng = np.random.default_rng(0)
    heap, scores = ScoreHeap(), {}
    for i in range(3000):
        key = ExpertKey(0, int(rng.integers(40)))
        if rng.random() < 0.2 and key in scores:
            heap.remove(key)
            del scores[key]
        else:
            scores[key] = (int(rng.integers(100)), i)
            heap.put(key, scores[key])
        busy = {ExpertKey(0, int(e)) for e in rng.integers(0, 40, 5)}
        free = {k: s for k, s in scores.items() if k not in busy}
        found = heap.least(busy)
        assert found == (min((s, k) for k, s in free.items()) if free else None)
        assert len(heap) == len(scores)
