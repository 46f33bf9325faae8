"""SRP, SCH and context independence: closed forms, brute force, planted traces and their shuffled controls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import InputError
from moestro.profile.measures import context_independence, sch, srp
from moestro.testing.planted import sticky_trace, zipf_trace
from tests.profile.make import layer, profile, trace, traced


def drawn(seed, tokens=24, experts=4, top_k=2, layers=1):
    rng = np.random.default_rng(seed)
    return np.stack([[rng.choice(experts, top_k, replace=False) for _ in range(tokens)] for _ in range(layers)])


def of(made):
    return profile(trace=made, layers=tuple(layer(e, made.experts_LTK.shape[2]) for e in made.num_experts))


def test_a_window_of_one_is_perfect():
    found = srp.srp(traced(drawn(0), 4), window=1, draws=20)
    assert found.column("srp") == [1, 1] and found.column("rho") == [1, 1]


def test_constant_routing_is_perfect():
    found = srp.srp(traced(np.tile([1, 3], (2, 30, 1)), 8), window=6, draws=20)
    assert found.column("srp") == [1, 1, 1] and found.column("rho") == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_threshold_is_the_best_of_all_choices(seed, window):
    """F1 over every subset of cases is never above that of the best threshold."""
    cases = np.random.default_rng(seed).integers(0, window + 1, 9)
    if cases.sum() == 0:
        return
    value, _ = srp.best(np.bincount(cases, minlength=window + 1))
    brute = max(
        2 * cases[list(chosen)].sum() / (window * len(chosen) + cases.sum())
        for size in range(1, 10)
        for chosen in itertools.combinations(range(9), size)
    )
    assert value == pytest.approx(brute)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_srp_is_never_below_its_floor(seed, window):
    made = trace(drawn(seed), 4)
    value, _ = srp.best(srp.windows(made, window).sum((0, 1)))
    assert value >= 2 * 0.5 / 1.5 - 1e-12, "a threshold of 0 gives 2 a / (1 + a) with a = k / E"


def test_windows_stay_within_sequences():
    ids = drawn(1, tokens=20)
    both = srp.windows(trace(ids, 4, lengths=[12, 8]), 5)
    apart = [srp.windows(trace(ids[:, a:b], 4), 5)[:, 0] for a, b in ((0, 12), (12, 20))]
    assert np.array_equal(both, np.stack(apart, axis=1)) and both.sum() == (8 + 4) * 4
    with pytest.raises(InputError, match="no sequence of the trace has 13 tokens"):
        srp.windows(trace(ids, 4, lengths=[12, 8]), 13)


def test_the_null_of_independent_routing():
    """k / E = 1/8 at m = 16: about 0.32, far above 2 a / (1 + a) = 0.22."""
    found = srp.srp(of(zipf_trace(layers=1, experts=16, top_k=2, tokens=4000, exponent=0.0).trace), window=16, draws=20)
    assert found.column("srp")[-1] == pytest.approx(0.32, abs=0.02) == pytest.approx(found.column("shuffled")[-1], abs=0.02)


def test_repeating_routing_stands_above_its_shuffled_control():
    values = []
    for repeat in (0.0, 0.5, 0.9):
        found = srp.srp(of(sticky_trace(layers=2, tokens=1500, repeat=repeat).trace), window=8, draws=50)
        values.append(found.column("srp")[-1])
        assert found.column("low")[-1] <= values[-1] + 1e-9
        if repeat:
            assert values[-1] > found.column("shuffled")[-1] + 0.1 * repeat
    assert values == sorted(values)


# SCH


def rates(made, ratio, policy, window=4):
    hit, asked = sch.hits(made, sch.sequences_of(made, 10**6), ratio, policy, window)
    return hit.sum() / asked.sum()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_nobody_beats_belady_and_room_helps(seed, window):
    made = trace(drawn(seed, tokens=30, experts=6), 6, lengths=[18, 12])
    before = 0.0
    for ratio in (1, 1.5, 2, 2.5, 3):
        segment, lru, belady = (rates(made, ratio, p, window) for p in ("segment", "lru", "belady"))
        assert segment <= belady + 1e-12 and lru <= belady + 1e-12
        assert belady >= before - 1e-12
        before = belady
    assert segment == lru == belady == 1, "room for all"


def test_belady_against_brute_force():
    """Every way to keep C experts after each token, by dynamic programming over the cache's content."""
    made = trace(drawn(3, tokens=14, experts=5, top_k=1), 5)
    ids = made.experts_LTK[0, :, 0].tolist()
    for slots in (1, 2, 3):
        states = {frozenset(): 0}
        for t, e in enumerate(ids):
            following: dict[frozenset, int] = {}
            for held, score in states.items():
                cold = e not in ids[:t] and len(set(ids[:t])) < slots
                gained = score + (e in held or cold)
                full = held | {e}
                for kept in itertools.combinations(sorted(full), min(slots, len(full))):
                    following[frozenset(kept)] = max(following.get(frozenset(kept), -1), gained)
            states = following
        assert rates(made, slots, "belady") * len(ids) == pytest.approx(max(states.values()))


def test_lru_of_a_cycle_and_of_constant_routing():
    cycle = trace((np.arange(40) % 5)[None, :, None], 5)
    assert rates(cycle, 4, "lru") == pytest.approx(4 / 40), "only the cold starts"
    assert rates(cycle, 5, "lru") == 1 and rates(cycle, 4, "belady") > 0.7
    assert rates(trace(np.tile([0, 2], (1, 30, 1)), 5), 1, "segment") == 1


def test_sch_in_a_table():
    made = of(sticky_trace(layers=2, tokens=600, repeat=0.8).trace)
    found = sch.sch(made, window=8, draws=20)
    assert found.column("layer") == [0, 1, "all"]
    for row in found.rows:
        named = dict(zip(found.columns, row))
        assert named["lru"] <= named["sch"] + 0.01 <= named["belady"] + 0.02 and named["sch"] > named["shuffled"] + 0.2
    with pytest.raises(InputError, match="a ratio of"):
        sch.sch(made, ratio=0.5)


# What routing follows


def test_planted_routing_follows_the_id(case):
    found = context_independence.context_independence(case.profile("counts"), least=4)
    assert found.column("id") == [1, 1] and found.column("id_gain") == [1, 1]
    for other in ("previous", "next", "position", "domain"):
        assert max(found.column(f"{other}_gain")) < 0.6
    assert min(found.column("domain_gain")) > 0.1, "a domain has its own four experts"


def test_shuffled_experts_follow_nothing():
    rng = np.random.default_rng(0)
    made = trace(drawn(0, tokens=3000, experts=8), 8, lengths=[300] * 10, tokens_T=rng.integers(0, 20, 3000).astype(np.int32))
    (row,) = context_independence.context_independence(of(made)).rows
    gains = dict(zip(context_independence.context_independence(of(made)).columns, row))
    assert all(abs(gains[f"{name}_gain"]) < 0.02 for name in ("id", "previous", "next"))


def test_neighbours_stay_within_sequences():
    made = trace(drawn(0, tokens=5), 4, lengths=[2, 3], tokens_T=np.array([7, 8, 9, 10, 11], np.int32))
    found = context_independence.features(made)
    assert found["previous"].tolist() == [-1, 7, -1, 9, 10] and found["next"].tolist() == [8, -1, 10, 11, -1]
