"""Laws of every eviction policy, over the whole catalogue of the kind."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.experts import ExpertKey
from moestro.engine.replay import BELADY, Demands, eviction_factory, pins_of, replay
from moestro.engine.table import Moment, SlotTable
from tests.engine.traces import cyclic, periodic, sticky, topics, trace_of, zipf
from tests.laws.cards import cards

CARDS = cards("moestro.engine.evict", "eviction")
NAMES = [card.name for card in CARDS]
LIVE = [card.name for card in CARDS if "future" not in card.needs]
TRACES = {
    "sticky": functools.cache(lambda: sticky(prefill=20, passes=2)),
    "zipf": functools.cache(zipf),
    "cyclic": functools.cache(lambda: cyclic(layers=2)),
    "periodic": functools.cache(periodic),
    "topics": functools.cache(topics),
}


def run(name, trace, slots, scope="global"):
    split = (slots,) if scope == "global" else (slots,) * trace.layers
    return replay(trace, split, scope, name, pinned=pins_of(name, trace, split, scope))


def test_the_catalogue_is_walked():
    assert {"engine.evict.lru", "engine.evict.belady"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_victims_are_residents_that_are_not_busy(name, data):
    """Any order of demands, hints and drops: only idle residents leave, residents never exceed the slots, no two share one."""
    layers, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 8))
    scope = data.draw(st.sampled_from(["global", "layer"]))
    slots = [data.draw(st.integers(1, experts)) for _ in range(1 if scope == "global" else layers)]
    table = SlotTable(slots, scope, eviction_factory(name, None, {}), layers=layers)
    subsets = st.lists(st.integers(0, experts - 1), min_size=1, max_size=experts, unique=True)
    withdrawn = 0
    for step in range(data.draw(st.integers(1, 12))):
        for layer in range(layers):
            moment = Moment(step, layer, data.draw(st.booleans()))
            want = [ExpertKey(layer, e) for e in data.draw(subsets)]
            for wave in table.waves(want, moment):
                held = {p.key for p in wave.placements}
                withdrawn += len(wave.withdrawn)
                following = (layer + 1) % layers
                placed = table.hint([ExpertKey(following, e) for e in data.draw(subsets)], moment)
                assert not held & {p.evicted for p in placed}
                assert held <= set(table.residents())
            residents = table.residents()
            assert len(residents) <= sum(slots)
            assert len({table.slot_of(k) for k in residents}) == len(residents)
    counts = table.counts()
    assert counts.demands == counts.hits + counts.misses
    assert counts.loads - counts.evictions - withdrawn == len(table), "what came and did not leave is still there"


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("planted", TRACES)
@pytest.mark.parametrize("name", LIVE)
def test_nobody_beats_belady(name, planted, scope):
    trace = TRACES[planted]()
    most = max(Demands(trace).largest)
    for slots in sorted({most, most + 1, 2 * most, 8, 16}):
        if slots >= most and (scope == "global" or slots <= trace.num_experts[0]):
            bound = run(BELADY, trace, slots, scope)
            found = run(name, trace, slots, scope)
            assert (found.prefill + found.decode).hits <= (bound.prefill + bound.decode).hits, f"{slots} slots"


@pytest.mark.parametrize("name", LIVE)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_nobody_beats_belady_on_any_trace(name, data):
    experts, slots, layers = 6, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    tokens = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trace = trace_of(
        np.stack([[rng.choice(experts, slots, replace=False) for _ in range(tokens)] for _ in range(layers)]), experts
    )
    capacity = data.draw(st.integers(slots, layers * experts))
    assert run(name, trace, capacity).decode.hits <= run(BELADY, trace, capacity).decode.hits


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", NAMES)
def test_with_room_for_all_each_expert_is_read_once(name, scope):
    trace = sticky(prefill=30)
    slots = sum(trace.num_experts) if scope == "global" else trace.num_experts[0]
    report = run(name, trace, slots, scope)
    used = int(np.count_nonzero(trace.counts()))
    assert (report.prefill + report.decode).misses == used
    assert (report.prefill + report.decode).evictions == 0


@pytest.mark.parametrize("name", NAMES)
def test_decisions_are_reproducible(name):
    trace = sticky(seed=3)
    assert run(name, trace, 12) == run(name, trace, 12)


@pytest.mark.parametrize("name", NAMES)
def test_constant_routing_misses_once(name):
    trace = trace_of(np.tile(np.arange(3), (4, 50, 1)), 9)
    report = run(name, trace, 12)
    assert report.decode.misses == 12
