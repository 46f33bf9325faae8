"""The slot table: leases, waves, pins, hints, and counts."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.engine.evict.lru import Lru
from moestro.engine.table import Counts, Moment, SlotTable, needed


def keys(layer, *experts):
    return [ExpertKey(layer, e) for e in experts]


def at(step, layer=0, prefill=False):
    return Moment(step, layer, prefill)


def test_demand_places_residents_first_and_counts():
    table = SlotTable([4], "global", Lru, layers=2)
    first = table.demand(keys(0, 5, 6), at(0))
    assert [(p.key.expert, p.slot, p.hit) for p in first] == [(5, 0, False), (6, 1, False)]
    table.release(keys(0, 5, 6))
    second = table.demand(keys(0, 7, 6), at(1))
    assert [(p.key.expert, p.hit) for p in second] == [(6, True), (7, False)]
    assert table.counts() == Counts(demands=4, hits=1, misses=3)
    assert table.counts(layer=1) == Counts()
    assert table.counts().hit_rate == 0.25


def test_a_leased_key_is_never_evicted():
    table = SlotTable([3], "global", Lru, layers=1)
    table.demand(keys(0, 0, 1), at(0))
    for e in range(2, 9):
        (placed,) = table.demand(keys(0, e), at(e))
        table.release([placed.key])
        assert placed.slot == 2
        assert {*keys(0, 0, 1)} <= set(table.residents())
    with pytest.raises(AssertionError, match="waves"):
        table.demand(keys(0, 20, 21), at(20))


def test_a_key_leased_twice_needs_two_releases():
    table = SlotTable([2], "global", Lru, layers=1)
    table.demand(keys(0, 0), at(0))
    table.demand(keys(0, 0), at(1))
    table.release(keys(0, 0))
    assert table.room(0) == 1
    table.release(keys(0, 0))
    assert table.room(0) == 2


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 19, 20, 40])
def test_waves_serve_every_key_once_and_hit_every_resident(slots):
    table = SlotTable([slots], "global", Lru, layers=1)
    rng = np.random.default_rng(slots)
    for step in range(30):
        want = keys(0, *rng.choice(20, rng.integers(1, 21), replace=False).tolist())
        before = set(table.residents())
        served, held = [], []
        for wave in table.waves(want, at(step)):
            served += wave.placements
            held = held[-1:] + [wave.placements]
            live = {p.key: p.slot for part in held[-(1 + (slots > 1)) :] for p in part}
            assert all(table.slot_of(k) == s for k, s in live.items()), "a leased expert moved"
            assert len(set(live.values())) == len(live)
            assert wave.last == (len(served) == len(want))
        assert {p.key for p in served} == set(want) and len(served) == len(want)
        assert {p.key for p in served if p.hit} == before & set(want)
        assert table.room(0) == slots
        assert len(table) <= slots


def test_closing_waves_early_releases():
    table = SlotTable([4], "global", Lru, layers=1)
    waves = table.waves(keys(0, *range(10)), at(0))
    next(waves)
    next(waves)
    assert table.room(0) == 0
    waves.close()
    assert table.room(0) == 4


def test_pinned_experts_are_loaded_once():
    pins = keys(0, 3, 4)
    table = SlotTable([4], "global", Lru, layers=1, pinned=pins)
    rng = np.random.default_rng(0)
    loads = 0
    for step in range(50):
        for wave in table.waves(keys(0, *rng.choice(12, 5, replace=False).tolist()), at(step)):
            for p in wave.placements:
                loads += p.key in pins and not p.hit
                assert p.evicted not in pins
                assert p.key not in pins or p.slot == pins.index(p.key)
    assert loads == 2
    with pytest.raises(InputError, match="pinned"):
        SlotTable([2], "global", Lru, layers=1, pinned=pins)


def test_layers_have_their_own_slots_with_scope_layer():
    table = SlotTable([2, 3], "layer", Lru, layers=2)
    for step in range(10):
        for layer in (0, 1):
            for wave in table.waves(keys(layer, step % 4, (step + 1) % 4), at(step, layer)):
                low, high = ((0, 2), (2, 5))[layer]
                assert all(low <= p.slot < high for p in wave.placements)
    assert len(table) == 5
    with pytest.raises(InputError, match="one per MoE layer"):
        SlotTable([2], "layer", Lru, layers=2)
    with pytest.raises(InputError, match="scope"):
        SlotTable([2], "all", Lru, layers=2)


def test_hints_spare_leased_current_and_each_other():
    table = SlotTable([4], "global", Lru, layers=2)
    for _ in table.waves(keys(0, 0, 1), at(0)):
        placed = table.hint(keys(1, 0, 1, 2, 3), at(0))
        assert [p.key.expert for p in placed] == [0, 1]
        assert table.hint(keys(1, 0, 1), at(0)) == []
    assert {*keys(0, 0, 1)} <= set(table.residents())
    assert table.hint(keys(1, 2), at(0))[0].evicted == ExpertKey(1, 0), "the current demand is spared after its release too"
    assert table.hint(keys(1, 3), at(0), spare_current=False)[0].evicted == ExpertKey(0, 0)
    assert table.counts(prefill=False) == Counts(
        demands=2, misses=2, evictions=2, prefetch_issued=4, prefetch_used=0, prefetch_wasted=1
    )


def test_a_prefetched_expert_is_a_hit_once_used():
    table = SlotTable([4], "global", Lru, layers=2)
    table.hint(keys(1, 7), at(0))
    (p,) = table.demand(keys(1, 7), at(0, 1))
    assert p.hit and p.prefetched
    table.release([p.key])
    (p,) = table.demand(keys(1, 7), at(1, 1))
    assert p.hit and not p.prefetched
    counts = table.counts(layer=1)
    assert (counts.hits, counts.misses, counts.loads, counts.prefetch_used) == (2, 0, 1, 1)


def test_a_failed_read_can_be_dropped():
    table = SlotTable([2], "global", Lru, layers=1)
    table.hint(keys(0, 1), at(0))
    table.drop(ExpertKey(0, 1))
    assert len(table) == 0
    (p,) = table.demand(keys(0, 1), at(0))
    assert not p.hit
    with pytest.raises(AssertionError, match="in use"):
        table.drop(ExpertKey(0, 1))


def test_phases_are_counted_apart():
    table = SlotTable([4], "global", Lru, layers=1)
    for step, prefill in enumerate((True, False, False)):
        for _ in table.waves(keys(0, 0, 1), at(step, 0, prefill)):
            pass
    assert table.counts(prefill=True) == Counts(demands=2, misses=2)
    assert table.counts(prefill=False) == Counts(demands=4, hits=4)
    table.reset_counts()
    assert table.counts() == Counts() and len(table) == 2


def test_needed_puts_the_most_wanted_first():
    assert needed(3, np.array([[5, 2, -1, 9]])) == keys(3, 2, 5, 9)
    assert needed(0, np.array([[1, 2], [2, 3], [3, -1], [0, 2]])) == keys(0, 2, 3, 0, 1)
    assert needed(0, np.full((2, 2), -1)) == []
