"""Laws of every way to divide slots among layers, over the whole catalogue of the kind."""

from __future__ import annotations

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import BudgetError
from tests.laws.cards import cards

CARDS = cards("moestro.engine.allocate", "allocation")


def allocate(card, capacity, experts, top_k, weights):
    function = getattr(importlib.import_module(card.module), card.attribute)
    return function(capacity, experts, top_k, *([weights] if "demand" in card.needs else []))


def test_the_catalogue_is_walked():
    assert {"uniform", "shallow", "demand"} <= {card.attribute for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_slots_sum_to_the_capacity_within_bounds(card, data):
    layers = data.draw(st.integers(1, 12))
    experts = data.draw(st.lists(st.integers(1, 64), min_size=layers, max_size=layers))
    top_k = [data.draw(st.integers(1, n)) for n in experts]
    weights = [data.draw(st.floats(0, 100)) for _ in experts]
    capacity = data.draw(st.integers(sum(top_k), sum(experts) + 10))
    slots = allocate(card, capacity, experts, top_k, weights)
    assert sum(slots) == min(capacity, sum(experts))
    assert all(k <= n <= e for k, n, e in zip(top_k, slots, experts, strict=True))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_too_few_slots_are_refused_with_the_least_number(card):
    with pytest.raises(BudgetError) as error:
        allocate(card, 7, [8, 8, 8], [3, 3, 2], [1, 1, 1])
    assert error.value.smallest == 8
    assert allocate(card, 8, [8, 8, 8], [3, 3, 2], [1, 1, 1]) == (3, 3, 2)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_more_capacity_takes_from_no_layer_by_more_than_rounding(card):
    experts, top_k, weights = [16] * 6, [2] * 6, [1, 5, 2, 2, 9, 3]
    before = allocate(card, 12, experts, top_k, weights)
    for capacity in range(13, 97):
        now = allocate(card, capacity, experts, top_k, weights)
        assert all(b - a >= -1 for a, b in zip(before, now, strict=True))
        before = now
