"""Predictors on planted traces, and the path table's file."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.engine.predict.edgemoe import EdgeMoeTable
from moestro.engine.predict.gate import Gate
from moestro.engine.predict.oracle import Oracle
from moestro.engine.predict.previous import Previous
from moestro.engine.prefetch import Glimpse
from moestro.engine.replay import Demands, replay
from moestro.engine.table import Moment
from tests.engine.traces import periodic, sticky, trace_of

NOW = Moment(0, 0, False)


def recall(predictor, trace, start=0, width=None):
    """Share of layer l's experts (l > 0) among the guesses made one layer before; decode of the tokens from `start`."""
    hit = asked = 0
    for moment, _, rows in Demands(trace).list:
        layer = moment.layer
        predictor.observe(layer, trace.experts_LTK[layer, rows], moment)
        following = (layer + 1) % trace.layers
        ahead = None if trace.ahead_LTK is None or not following else Glimpse(ahead_TW=trace.ahead_LTK[layer, rows])
        guesses = set(predictor.predict(following, ahead)[:width])
        if following and rows.start >= start:
            truth = set(trace.experts_LTK[following, rows].reshape(-1).tolist()) - {-1}
            hit, asked = hit + len(truth & guesses), asked + len(truth)
    return hit / asked


def paths(tokens=600, experts=8, seed=0, order=2):
    """One expert per layer; layer l's follows from the last `order` layers' by a fixed random table, a little noise apart."""
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, experts, (4, experts, experts))
    out = np.empty((4, tokens, 1), np.int16)
    for t in range(tokens):
        for layer in range(4):
            if layer < 2 or rng.random() < 0.1:
                out[layer, t, 0] = rng.integers(experts)
            else:
                a = out[layer - 2, t, 0] if order == 2 else 0
                out[layer, t, 0] = tables[layer, a, out[layer - 1, t, 0]]
    return trace_of(out, experts)


def test_previous_is_right_on_constant_routing_and_as_good_as_the_repetition():
    constant = trace_of(np.tile(np.arange(3), (4, 50, 1)), 9)
    assert recall(Previous(4, (9,) * 4), constant, start=1) == 1
    trace = sticky(layers=6, tokens=800, slots=4, experts=64, repeat=0.6)
    assert recall(Previous(6, (64,) * 6), trace, start=1) == pytest.approx(0.6, abs=0.03)


def test_previous_takes_the_last_row_of_a_prompt():
    predictor = Previous(1, (9,))
    predictor.observe(0, np.array([[1, 2], [3, 4], [7, 5]]), Moment(0, 0, True))
    assert predictor.predict(0) == [5, 7]
    predictor.observe(0, np.array([[1, 2], [8, 2]]), NOW)
    assert predictor.predict(0) == [2, 1, 8]


def test_two_layers_tell_more_than_one_and_one_more_than_none():
    trace, other = paths(), paths(seed=0, tokens=900)
    assert trace.experts_LTK[:, :10].tolist() == other.experts_LTK[:, :10].tolist(), "the same tables"
    found = [recall(EdgeMoeTable.fit(other, order=order), trace, width=1) for order in (0, 1, 2)]
    assert found[0] + 0.03 < found[1] and found[1] + 0.2 < found[2]
    assert found[2] > 0.6


def test_rows_sum_to_one_and_back_off():
    table = EdgeMoeTable.fit(sticky(slots=3))
    rng = np.random.default_rng(0)
    for layer in range(4):
        keys = list(table._rows[layer])[:50]
        for key in keys:
            assert table.row(layer, [key]).sum() == pytest.approx(1)
        assert table.row(layer, []).sum() == pytest.approx(1)
        unknown = tuple(rng.integers(50, 60, 3).tolist())
        assert np.array_equal(table.row(layer, [unknown]), table.row(layer, []))
        if keys:
            assert np.array_equal(table.row(layer, [unknown, keys[0]]), table.row(layer, keys[:1]))


def test_counting_online_catches_up_and_memory_is_bounded():
    trace = periodic(layers=4, tokens=80, experts=16, period=4, seed=2)
    assert len({tuple(sorted(row)) for row in trace.experts_LTK[0, :4].tolist()}) == 4, "no two tokens begin alike"
    learner = EdgeMoeTable(4, (16,) * 4)
    assert recall(learner, trace, start=8, width=2) == 1, "every path has been seen"
    fixed = EdgeMoeTable(4, (16,) * 4, learn=False)
    assert recall(fixed, trace) == 0
    small = EdgeMoeTable(4, (12,) * 4, keys=5)
    recall(small, sticky())
    assert max(len(rows) for rows in small._rows) == 5


def test_the_table_survives_its_file(tmp_path):
    trace = paths(200)
    table = EdgeMoeTable.fit(trace)
    table.save(tmp_path / "table.json")
    again = EdgeMoeTable(4, (8,) * 4, path=str(tmp_path / "table.json"), learn=False)
    assert again._rows == table._rows and again._all == table._all
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match="another"):
        EdgeMoeTable(4, (9,) * 4, path=str(tmp_path / "table.json"))
    said = json.loads((tmp_path / "table.json").read_text())
    said["all"] = said["all"][:1]
    (tmp_path / "cut.json").write_text(json.dumps(said))
    (tmp_path / "bad.json").write_text("{")
    for name in ("cut.json", "bad.json", "none.json"):
        with pytest.raises(InputError, match="path table"):
            EdgeMoeTable(4, (8,) * 4, path=str(tmp_path / name))


def test_the_gate_is_the_oracle_when_the_glimpse_is_right():
    base = sticky()
    ahead = np.full((4, base.tokens, 2), -1, np.int16)
    ahead[:-1] = base.experts_LTK[1:]
    trace = sticky(ahead_LTK=ahead)
    assert recall(Gate(4, (12,) * 4), trace) == 1
    assert recall(Oracle(4, (12,) * 4, Demands(trace).future), trace) == 1


def test_widening_never_lowers_recall():
    base, rng = sticky(), np.random.default_rng(0)
    logits = rng.normal(size=(4, base.tokens, 12))
    for layer in range(3):
        np.put_along_axis(logits[layer], base.experts_LTK[layer + 1].astype(int), rng.normal(1.5, 1, (base.tokens, 2)), 1)
    trace = sticky(ahead_LTK=np.argsort(-logits, axis=-1).astype(np.int16))
    found = [recall(Gate(4, (12,) * 4), trace, width=width) for width in (2, 3, 4, 6, 12)]
    assert found == sorted(found) and found[0] < found[2] and found[-1] == 1


def test_a_live_router_is_asked_once_and_ranks_as_the_record():
    calls = []

    def router(x_TD, width):
        calls.append(width)
        return np.argsort(-x_TD, axis=1, kind="stable")[:, :width]

    x_TD = np.array([[0.1, 0.9, 0.5, 0.3], [0.2, 0.1, 0.9, 0.0]])
    gate = Gate(2, (4, 4), width=3)
    live = gate.predict(1, Glimpse(x_TD=x_TD, router=router))
    assert calls == [3]
    assert live == gate.predict(1, Glimpse(ahead_TW=router(x_TD, 3)))
    assert live[0] == 2, "first of one token, second of the other"


def test_the_gate_falls_back_to_the_previous_token_at_the_first_layer():
    gate = Gate(2, (4, 4))
    gate.observe(0, np.array([[3, 1]]), NOW)
    assert gate.predict(0, None) == [1, 3]


def test_an_oracle_leaves_no_miss_in_decode_but_the_first():
    trace = sticky()
    report = replay(trace, (4,), predictor="engine.predict.oracle", prefetch=2)
    assert report.decode.misses == 2, "layer 0 of the first pass"
    assert report.precision > 0.99 and report.recall > 0.99
