"""The native replays decide as the policy objects do: count for count, at every budget, on any trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.method import load
from moestro.engine.replay import Demands, count, eviction_factory, replay, sweep
from moestro.engine.table import SlotTable
from moestro.kernels import replay as kernel
from tests.engine.traces import sticky, topics, trace_of, zipf

NAMES = [f"engine.evict.{policy}" for policy in kernel.POLICIES]
pytestmark = pytest.mark.skipif(Demands(zipf()).flat is None, reason="no native code here")


def by_objects(trace, asked, name, scope, slots):
    """(decode, prefill) per layer through the slot table and the policy object."""
    known = asked.future if name.endswith("belady") else None
    table = SlotTable(slots, scope, eviction_factory(name, None, known), layers=trace.layers)
    for moment, keys, _ in asked.list:
        for _ in table.waves(keys, moment):
            pass
    return tuple([table.counts(prefill=p, layer=layer) for layer in range(trace.layers)] for p in (False, True))


def agree(trace, name, scope):
    asked, widest = Demands(trace), max(trace.num_experts)
    if scope == "global":
        slots = [(n,) for n in range(1, sum(trace.num_experts) + 1, 2)]
    else:
        slots = [
            tuple(min(n, 1 + (n + layer) % widest) for layer, n in enumerate(trace.num_experts)) for n in range(1, widest + 1)
        ]
        slots += [tuple(min(n, size) for n in trace.num_experts) for size in range(1, widest + 1)]
    found = count(asked, name, scope, slots)
    assert found is not None
    for one, counted in zip(slots, found, strict=True):
        assert counted == by_objects(trace, asked, name, scope, one), f"{name} {scope} {one}"


def test_each_policy_names_its_native_form():
    for name in NAMES:
        assert f"engine.evict.{load(name, 'eviction').native}" == name


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trace", [sticky(prefill=60, passes=3), zipf(prefill=40), topics()], ids=["sticky", "zipf", "topics"])
def test_planted_traces_agree_at_every_budget(trace, name, scope):
    agree(trace, name, scope)


@pytest.mark.parametrize("name", NAMES)
def test_many_experts_and_more_moments_than_are_kept_apart(name):
    """512 experts, and so many uses that what is numbered by moments is numbered anew on the way; the last budget holds them all."""
    trace = zipf(layers=2, tokens=300, slots=8, experts=256, power=0.3)
    for scope, slots in (("global", [(16,), (51,), (200,), (600,)]), ("layer", [(9, 40), (128, 256)])):
        asked = Demands(trace)
        found = count(asked, name, scope, slots)
        assert found == [by_objects(trace, asked, name, scope, one) for one in slots]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_trace_agrees_at_every_budget(name, data):
    """Layers of different sizes, empty slots, repeated ids, prompts of any length between decoded tokens, demands larger than the cache."""
    layers = data.draw(st.integers(1, 3))
    sizes = tuple(data.draw(st.integers(2, 7)) for _ in range(layers))
    lengths = data.draw(st.lists(st.sampled_from([1, 1, 1, 2, 5]), min_size=1, max_size=25))
    slots = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens = sum(lengths)
    experts_LTK = np.stack([rng.integers(-1, size, (tokens, slots)) for size in sizes])
    trace = trace_of(experts_LTK, 1)
    steps_T = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    prefill_T = np.repeat([n > 1 for n in lengths], lengths).astype(np.uint8)
    trace = type(trace)(
        trace.tokens_T, trace.sequences_T, trace.positions_T, steps_T, prefill_T, trace.experts_LTK, None, sizes, "drawn"
    )
    agree(trace, name, data.draw(st.sampled_from(["global", "layer"])))


def test_a_sweep_is_the_same_without_native_code(monkeypatch):
    trace = sticky(prefill=30, passes=2)
    with_native = sweep(trace, None, [0.2, 0.5, 0.9], scope="layer")
    monkeypatch.setattr(kernel.native, "extension", lambda: None)
    assert Demands(trace).flat is None
    assert sweep(trace, None, [0.2, 0.5, 0.9], scope="layer") == with_native


def test_a_setting_without_a_native_form_is_simulated():
    trace = zipf()
    assert count(Demands(trace), "engine.evict.slru", "global", [(8,)]) is None
    halved = replay(trace, (8,), eviction="engine.evict.lfu", eviction_options={"half_life": 5.0})
    assert halved.decode != replay(trace, (8,), eviction="engine.evict.lfu").decode


def test_scores_that_a_double_cannot_hold_are_left_to_the_policy_objects(monkeypatch):
    trace = zipf()
    monkeypatch.setattr(kernel, "EXACT", 1 << 10)
    assert count(Demands(trace), "engine.evict.lfu", "global", [(8,)]) is None


def test_the_kernel_refuses_what_it_cannot_read():
    asked = Demands(zipf()).flat
    assert asked is not None
    with pytest.raises(ValueError, match="ascend"):
        kernel.count(asked, "lru", [8, 4])
    with pytest.raises(ValueError, match="ascend"):
        kernel.count(asked, "lru", [0])
