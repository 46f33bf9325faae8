"""Traces made without a model have the planted statistics, and caches on them do what theory says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moestro.core.trace import Trace
from moestro.testing.planted import cyclic_trace, permuted_trace, sticky_trace, zipf_trace


def lru_hit_rate(experts_TK: np.ndarray, slots: int) -> float:
    cache: list[int] = []
    hits = 0
    for row in experts_TK.tolist():
        hits += sum(e in cache for e in row)
        cache = [e for e in cache if e not in row] + row
        cache = cache[-slots:]
    return hits / experts_TK.size


def belady_hit_rate(experts_T: np.ndarray, slots: int) -> float:
    cache: set[int] = set()
    hits = 0
    for t, e in enumerate(experts_T.tolist()):
        hits += e in cache
        if e not in cache and len(cache) == slots:
            later = experts_T[t + 1 :].tolist()
            cache.remove(max(cache, key=lambda c: later.index(c) if c in later else len(later)))
        cache.add(e)
    return hits / len(experts_T)


def test_a_sticky_trace_repeats_as_planted() -> None:
    planted = sticky_trace(tokens=4000, repeat=0.7, experts=16, top_k=2)
    for layer in planted.trace.experts_LTK:
        assert (np.diff(np.sort(layer, axis=1)) > 0).all(), "no expert twice in a row"
        assert lru_hit_rate(layer, 2) == pytest.approx(0.7 + 0.3 * 2 / 16, abs=0.02)


def test_a_cycle_defeats_lru_and_not_belady() -> None:
    layer = cyclic_trace(experts=8, tokens=800).trace.experts_LTK[0]
    assert lru_hit_rate(layer, 7) == 0 and lru_hit_rate(layer, 8) == pytest.approx(1, abs=0.02)
    assert belady_hit_rate(layer[:, 0], 5) == pytest.approx(4 / 7, abs=0.02)


def test_zipf_draws_have_the_planted_probabilities() -> None:
    planted = zipf_trace(tokens=20_000, experts=8, exponent=1.2)
    assert planted.probability_E is not None and planted.probability_E.sum() == pytest.approx(1)
    for layer, order in enumerate(planted.trace.info["order"]):
        found = planted.trace.counts()[layer][order] / 20_000
        assert found == pytest.approx(planted.probability_E, abs=0.015)
    wide = zipf_trace(tokens=200, experts=8, top_k=3).trace.experts_LTK
    assert all(len(set(row)) == 3 for row in wide[0].tolist())


def test_the_next_layer_of_a_permuted_trace_is_certain() -> None:
    trace = permuted_trace(layers=3, experts=8).trace
    for layer, table in enumerate(trace.info["permutation"]):
        assert (np.asarray(table)[trace.experts_LTK[layer]] == trace.experts_LTK[layer + 1]).all()
    repeats = (trace.experts_LTK[0][1:, :, None] == trace.experts_LTK[0][:-1, None, :]).any(-1).mean()
    assert repeats == pytest.approx(2 / 8, abs=0.06)


@pytest.mark.parametrize("prefill", [0, 1, 5])
def test_steps_and_files(prefill: int, tmp_path: Path) -> None:
    trace = sticky_trace(tokens=12, layers=2, prefill=prefill).trace
    steps = list(trace.steps())
    assert [s.prefill for s in steps] == [True] * (prefill > 0) + [False] * (12 - prefill)
    assert steps[0].rows == slice(0, max(prefill, 1)) and [s.step for s in steps] == list(range(len(steps)))
    trace.save(tmp_path / "trace")
    again = Trace.open(tmp_path / "trace")
    assert (again.experts_LTK == trace.experts_LTK).all() and again.num_experts == (16, 16)
