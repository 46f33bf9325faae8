"""The prefetcher: when it asks, for what, and how wide."""

from __future__ import annotations

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.engine.evict.lru import Lru
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.table import Moment, SlotTable


class Fixed:
    """Always the same ranking; remembers what it was shown."""

    def __init__(self, ranking):
        self.ranking, self.seen = ranking, []

    def observe(self, layer, experts_TK, moment):
        self.seen.append((layer, experts_TK.tolist()))

    def predict(self, layer, glimpse=None):
        self.seen.append((layer, glimpse))
        return self.ranking


def test_it_asks_for_the_next_layer_and_wraps():
    table = SlotTable([12], "global", Lru, layers=2)
    predictor = Fixed([4, 2, 7])
    prefetcher = Prefetcher(predictor, table, 2, trust=0)
    glimpse = Glimpse(ahead_TW=np.array([[1]]))
    first = prefetcher.routed(np.array([[0, 1]]), Moment(0, 0, False), glimpse)
    assert [p.key for p in first] == [ExpertKey(1, 4), ExpertKey(1, 2)]
    second = prefetcher.routed(np.array([[3, 1]]), Moment(0, 1, False), glimpse)
    assert [p.key for p in second] == [ExpertKey(0, 4), ExpertKey(0, 2)]
    assert predictor.seen == [(0, [[0, 1]]), (1, glimpse), (1, [[3, 1]]), (0, None)], "the last layer sees no next one"
    assert prefetcher.routed(np.array([[0, 1]]), Moment(1, 0, False), glimpse) == [], "all there"


def test_wrong_guesses_leave_with_their_layer_and_right_ones_stay():
    table = SlotTable([4], "layer", Lru, layers=1)
    held = [ExpertKey(0, 8), ExpertKey(0, 9)]
    for _ in table.waves(held, Moment(0, 0, False)):
        table.hint([ExpertKey(0, 1), ExpertKey(0, 2)], Moment(0, 0, False))
    slots = {key: table.slot_of(key) for key in table.residents()}
    (wave,) = table.waves([ExpertKey(0, 2), ExpertKey(0, 5)], Moment(1, 0, False))
    assert wave.withdrawn == [(ExpertKey(0, 1), slots[ExpertKey(0, 1)])]
    assert [(p.key.expert, p.hit, p.evicted) for p in wave.placements] == [(2, True, None), (5, False, None)]
    assert wave.placements[1].slot == slots[ExpertKey(0, 1)], "the slot is free again: nothing else had to leave"
    counts = table.counts()
    assert (counts.prefetch_issued, counts.prefetch_used, counts.prefetch_wasted, counts.evictions) == (2, 1, 1, 0)


def test_a_pinned_guess_stays():
    table = SlotTable([3], "global", Lru, layers=1, pinned=[ExpertKey(0, 1)])
    table.hint([ExpertKey(0, 1)], Moment(0, 0, False))
    (wave,) = table.waves([ExpertKey(0, 2)], Moment(1, 0, False))
    assert not wave.withdrawn and ExpertKey(0, 1) in table


def test_guesses_are_believed_as_long_as_they_are_right():
    """One layer whose guess of rank 0 is always right and whose guess of rank 1 never is; experts leave at once."""
    table, asked = SlotTable([2], "global", Lru, layers=2), []
    prefetcher = Prefetcher(Fixed([4, 7]), table, 2)
    for step in range(40):
        for layer in (0, 1):
            moment = Moment(step, layer, False)
            for _ in table.waves([ExpertKey(layer, 4)], moment):
                asked.append({p.key.expert for p in prefetcher.routed(np.array([[4]]), moment)})
        for key in table.residents():
            table.drop(key)
    assert 4 in asked[0], "a beginner is believed"
    assert not any(7 in found for found in asked[2:]), "one wrong guess is enough at the start"
    assert all(found == {4} for found in asked[40::2]), "the layer does not answer for the rank that is always wrong"


def test_width_zero_does_nothing_at_all():
    predictor = Fixed([1])
    table = SlotTable([4], "global", Lru, layers=2)
    assert Prefetcher(predictor, table, 0).routed(np.array([[0]]), Moment(0, 0, False)) == []
    assert predictor.seen == [] and len(table) == 0


def test_a_full_house_of_leases_is_left_alone():
    table = SlotTable([2], "global", Lru, layers=2)
    prefetcher = Prefetcher(Fixed([0, 1]), table, 2)
    held = [ExpertKey(0, 0), ExpertKey(0, 1)]
    table.demand(held, Moment(0, 0, False))
    assert prefetcher.routed(np.array([[0, 1]]), Moment(0, 0, False)) == []
    assert set(table.residents()) == set(held)


def test_a_glimpse_knows_at_most_what_was_asked():
    ids = np.arange(12).reshape(2, 6)
    assert Glimpse(ahead_TW=ids).ids(4).tolist() == ids[:, :4].tolist()  # type: ignore[union-attr]
    assert Glimpse(x_TD=ids, router=lambda x, width: x).ids(3).shape == (2, 3)  # type: ignore[union-attr]
    assert Glimpse().ids(3) is None
