"""Laws of every predictor, over the whole catalogue of the kind."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.core.experts import ExpertKey
from moestro.engine.evict.lru import Lru
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.replay import Demands, make_predictor, replay
from moestro.engine.table import Moment, SlotTable
from tests.engine.traces import sticky
from tests.laws.cards import cards

CARDS = cards("moestro.engine.predict", "predictor")
NAMES = [card.name for card in CARDS]
CAUSAL = [card.name for card in CARDS if "future" not in card.needs]


def with_ahead(**more):
    trace = sticky(prefill=24, passes=2, **more)
    rng = np.random.default_rng(7)
    ahead = rng.integers(0, 12, (4, trace.tokens, 4)).astype(np.int16)
    ahead[:-1, :, :2] = trace.experts_LTK[1:]
    return sticky(prefill=24, passes=2, ahead_LTK=ahead, **more)


def guesses(name, trace, upto=None):
    """Every ranking in order, for the first `upto` tokens."""
    asked = Demands(trace)
    predictor = make_predictor(name, trace.layers, trace.num_experts, None, asked.future)
    out = []
    for moment, _, rows in asked.list:
        if upto is not None and rows.stop > upto:
            break
        predictor.observe(moment.layer, trace.experts_LTK[moment.layer, rows], moment)
        following = (moment.layer + 1) % trace.layers
        glimpse = Glimpse(ahead_TW=trace.ahead_LTK[moment.layer, rows]) if following else None
        out.append((following, predictor.predict(following, glimpse)))
    return out


def test_the_catalogue_is_walked():
    assert {"engine.predict.none", "engine.predict.oracle"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_rankings_name_each_expert_once(name):
    trace = with_ahead()
    for layer, ranking in guesses(name, trace):
        assert len(set(ranking)) == len(ranking)
        assert all(isinstance(e, int) and 0 <= e < trace.num_experts[layer] for e in ranking)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_does_not_change_a_guess(name):
    """Cutting the trace short leaves every earlier ranking as it was."""
    trace = with_ahead()
    other = with_ahead()
    other.experts_LTK[:, 100:] = 11 - other.experts_LTK[:, 100:]
    assert guesses(name, trace, 100) == guesses(name, other, 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_prefetching_never_changes_what_is_demanded(name, scope):
    trace = with_ahead()
    slots = (14,) if scope == "global" else (4,) * 4
    plain = replay(trace, slots, scope)
    found = replay(trace, slots, scope, predictor=name, prefetch=2)
    assert (found.decode.demands, found.prefill.demands) == (plain.decode.demands, plain.prefill.demands)
    both = found.prefill + found.decode
    assert both.hits + both.misses == both.demands
    assert both.prefetch_used + both.prefetch_wasted <= both.prefetch_issued
    assert 0 <= found.precision <= 1 and 0 <= found.recall <= 1


@pytest.mark.parametrize("name", NAMES)
def test_width_bounds_the_requests(name):
    trace = with_ahead()
    asked = Demands(trace)
    for width in (0, 1, 3):
        table = SlotTable([20], "global", Lru, layers=4)
        prefetcher = Prefetcher(make_predictor(name, 4, trace.num_experts, None, asked.future), table, width)
        for moment, keys, rows in asked.list:
            for _ in table.waves(keys, moment):
                glimpse = Glimpse(ahead_TW=trace.ahead_LTK[moment.layer, rows])
                placed = prefetcher.routed(trace.experts_LTK[moment.layer, rows], moment, glimpse)
                assert len(placed) <= width
                assert all(p.key.layer == (moment.layer + 1) % 4 and not p.hit for p in placed)
                assert not {p.evicted for p in placed} & set(keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_predictor_starts_without_knowing_anything(name):
    predictor = make_predictor(name, 3, (4, 4, 4), None, {})
    assert predictor.predict(0, None) == []
    predictor.observe(0, np.array([[1, -1]]), Moment(0, 0, False))
    assert ExpertKey(1, 0) and all(0 <= e < 4 for e in predictor.predict(1, Glimpse()))
