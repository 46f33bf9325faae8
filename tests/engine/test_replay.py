"""Replay and sweeps: counts, the LRU shortcut, bytes, the null."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.engine.evict.lru import Lru
from moestro.engine.replay import (
    BELADY,
    LRU,
    Demands,
    eviction_factory,
    make_predictor,
    policies,
    replay,
    sweep,
    uniform_like,
)
from moestro.engine.table import Counts, SlotTable
from tests.engine.traces import cyclic, sticky, trace_of, zipf


def simulated(trace, slots, scope):
    """LRU without the shortcut."""
    table = SlotTable(slots, scope, Lru, layers=trace.layers)
    for moment, keys, _ in Demands(trace).list:
        for _ in table.waves(keys, moment):
            pass
    return table


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("trace", [sticky(prefill=60, passes=3), zipf(), cyclic(layers=3)], ids=["sticky", "zipf", "cyclic"])
def test_the_lru_shortcut_agrees_count_for_count(trace, scope):
    for slots in range(1, 30, 3):
        split = (slots,) if scope == "global" else tuple(min(trace.num_experts[0], slots + i) for i in range(trace.layers))
        table, report = simulated(trace, split, scope), replay(trace, split, scope)
        assert report.prefill == table.counts(prefill=True)
        assert report.decode == table.counts(prefill=False)
        assert report.layers == tuple(table.counts(prefill=False, layer=i) for i in range(trace.layers))


def test_counts_of_a_trace_done_by_hand():
    """Two layers, 2 slots each; prompt of two tokens in one pass, then three decoded."""
    experts = [[[0], [1], [0], [2], [1]], [[3], [3], [3], [-1], [3]]]
    trace = trace_of(experts, 4, prefill=2)
    report = replay(trace, (2, 2), "layer", expert_bytes=[10, 100])
    assert report.prefill == Counts(demands=3, misses=3)
    assert report.decode == Counts(demands=5, hits=3, misses=2, evictions=2)
    assert (report.prefill_tokens, report.decode_tokens) == (2, 3)
    assert report.missed_bytes == (120, 20) and report.read_bytes == report.missed_bytes
    assert report.missed_bytes_per_token() == pytest.approx(20 / 3)
    assert report.missed_bytes_per_token(prefill=True) == 60
    assert report.hit_rate == 3 / 5


def test_bytes_of_prefetches_are_read_but_not_missed():
    report = replay(sticky(), (6,), predictor="engine.predict.previous", prefetch=2, expert_bytes=[10] * 4)
    both = report.prefill + report.decode
    assert both.prefetch_issued > 0
    assert sum(report.missed_bytes) == 10 * both.misses
    assert sum(report.read_bytes) == 10 * (both.misses + both.prefetch_issued)
    assert report.precision == both.prefetch_used / both.prefetch_issued


def test_an_expert_counts_once_per_pass():
    trace = trace_of([[[0], [0], [1], [0]]], 4, prefill=3)
    assert replay(trace, (4,)).prefill == Counts(demands=2, misses=2)


def test_an_empty_trace_replays():
    report = replay(trace_of(np.zeros((2, 0, 1)), 4), (2,))
    assert report.decode == Counts() and report.hit_rate == 1


def test_the_null_keeps_passes_and_slots_and_is_uniform():
    trace = sticky(prefill=20, tokens=600, slots=3)
    trace.experts_LTK[1, ::2, 2] = -1
    null = uniform_like(trace)
    assert np.array_equal(null.steps_T, trace.steps_T) and np.array_equal(null.experts_LTK < 0, trace.experts_LTK < 0)
    for row in null.experts_LTK.reshape(-1, 3).tolist():
        used = [e for e in row if e >= 0]
        assert len(set(used)) == len(used)
    expected = 600 * 3 / 12
    assert abs(null.counts()[0] - expected).max() < 5 * expected**0.5
    assert np.array_equal(null.experts_LTK, uniform_like(trace).experts_LTK)
    assert not np.array_equal(null.experts_LTK, uniform_like(trace, seed=1).experts_LTK)


def test_a_sweep_has_every_policy_the_bound_and_the_null():
    trace = sticky(prefill=20)
    seen = []
    done = sweep(trace, None, [0.5, 0.25, 0.5], progress=lambda i, n: seen.append((i, n)))
    assert done.budgets == ((0, 12), (0, 24)) and done.experts == 48
    names = {(row["routing"], row["eviction"]) for row in done.rows()}
    assert names == {("trace", n) for n in [*policies(), BELADY]} | {("uniform", LRU), ("uniform", BELADY)}
    rates = {(row["routing"], row["eviction"]): row["hit_rate"] for row in done.rows()}
    assert all(len(r) == 2 and r[0] <= r[1] for (_, name), r in rates.items() if name in (LRU, BELADY))
    assert rates["trace", LRU][0] > rates["uniform", LRU][0] + 0.1, "sticky routing is worth caching, uniform is not"
    assert seen[-1] == (len(done.reports), len(done.reports))
    assert json.loads(json.dumps(done.to_json()))["reports"][0]["decode"]["hit_rate"] == done.reports[0].decode.hit_rate
    text = done.table()
    assert "trace lru" in text and "uniform belady" in text and "12 (25 %)" in text


def test_a_sweep_per_layer_and_with_sizes():
    from tests.engine.test_residency import facts

    done = sweep(sticky(), facts(expert_bytes=1000), [0.25, 20_500], ["lru", BELADY], scope="layer", null=False)
    assert done.budgets == ((12_000, 12), (20_000, 20))
    assert [r.slots for r in done.reports] == [(3,) * 4, (5,) * 4] * 2
    assert done.reports[0].missed_bytes_per_token() == 1000 * done.reports[0].decode.misses / 200


def test_impossible_sweeps_are_refused():
    with pytest.raises(InputError, match="without a model"):
        sweep(sticky(), None, [1000.0])
    with pytest.raises(InputError, match="at least 2"):
        sweep(sticky(), None, [0.02])
    with pytest.raises(InputError, match="at least 8"):
        sweep(sticky(), None, [0.1], scope="layer")
    with pytest.raises(InputError, match="not a method"):
        sweep(sticky(), None, [0.5], ["mru"])


def test_names_that_need_the_future_are_refused_live():
    with pytest.raises(InputError, match="future"):
        eviction_factory("belady")
    with pytest.raises(InputError, match="future"):
        make_predictor("oracle", 2, (4, 4))
    with pytest.raises(InputError, match="no option"):
        eviction_factory("slru", {"share": 1})
