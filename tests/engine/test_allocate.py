"""Dividing slots among layers: closed forms and planted demand."""

from __future__ import annotations

import numpy as np
import pytest

from moestro.engine.allocate.demand import demand, working_set
from moestro.engine.allocate.shallow import shallow
from moestro.engine.allocate.uniform import uniform
from moestro.engine.replay import replay
from tests.engine.traces import sticky, trace_of


def test_uniform_differs_by_one_at_most():
    assert uniform(26, [16] * 4, [2] * 4) == (7, 7, 6, 6)
    assert uniform(40, [4, 16, 16], [2, 2, 2]) == (4, 16, 16)
    assert uniform(24, [4, 16, 16], [2, 2, 2]) == (4, 10, 10)
    assert uniform(20, [16, 16], [12, 2]) == (12, 8)


def test_the_first_layers_are_filled_in_order():
    assert shallow(40, [12] * 6, [2] * 6, boundary=2) == (12, 12, 4, 4, 4, 4)
    assert shallow(20, [12] * 6, [2] * 6, boundary=3) == (10, 2, 2, 2, 2, 2)
    assert shallow(26, [12] * 6, [2] * 6, boundary=0) == uniform(26, [12] * 6, [2] * 6)


def test_whole_layers_never_miss_after_warm_up():
    trace = sticky(layers=5, tokens=300)
    slots = shallow(36, [12] * 5, [2] * 5, boundary=2)
    report = replay(trace, slots, "layer")
    assert slots[:2] == (12, 12)
    assert [c.evictions for c in report.layers[:2]] == [0, 0]
    assert all(c.misses <= 12 for c in report.layers[:2]) and all(c.misses > 24 for c in report.layers[2:])


def test_slots_are_proportional_to_demand():
    assert demand(40, [64] * 3, [1] * 3, np.array([1.0, 3.0, 4.0])) == (5, 15, 20)
    assert demand(40, [64, 10, 64], [1] * 3, np.array([1.0, 3.0, 4.0])) == (6, 10, 24)
    assert demand(9, [64] * 3, [2] * 3, np.zeros(3)) == (3, 3, 3)


def test_the_working_set_is_counted():
    rng = np.random.default_rng(0)
    constant = np.tile([0, 1], (160, 1))
    wandering = np.stack([rng.choice(32, 2, replace=False) for _ in range(160)])
    rotating = np.stack([np.arange(160) % 4, 4 + np.arange(160) % 4], axis=1)
    trace = trace_of(np.stack([constant, wandering, rotating]), 32)
    found = working_set(trace, 16)
    assert found[0] == 2 and found[2] == 8 and found[1] == pytest.approx(32 * (1 - (30 / 32) ** 16), abs=1.5)
    slots = demand(24, [32] * 3, [2] * 3, found)
    assert slots[0] == 2 and slots[1] > slots[2]
    two = trace_of(trace.experts_LTK[:2], 32)
    measured, even = (replay(two, s, "layer").hit_rate for s in (demand(16, [32] * 2, [2] * 2, found[:2]), (8, 8)))
    assert measured > even + 0.05, "a layer that stays with two experts needs no eight slots"


def test_the_working_set_prefers_decoded_tokens():
    experts = np.concatenate([np.arange(32)[None, :, None], np.zeros((1, 32, 1), int)], axis=1)
    assert working_set(trace_of(experts, 32, prefill=32), 8)[0] == 1
    assert working_set(trace_of(experts[:, :32], 32, prefill=32), 8)[0] == 8
