"""Traces: what is saved is what is read, and a damaged file is refused with a reason."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from moestro.core.errors import StorageError, TraceError
from moestro.core.trace import Trace


@pytest.fixture
def trace() -> Trace:
    rng = np.random.default_rng(0)
    layers, tokens, slots, experts = 3, 12, 2, (4, 6, 6)
    ids = np.stack([[rng.permutation(e)[:slots] for _ in range(tokens)] for e in experts]).astype(np.int16)
    ids[0, :, 1] = -1  # a layer with one slot, padded
    return Trace(
        tokens_T=np.arange(tokens, dtype=np.int32),
        sequences_T=np.array([0] * 8 + [1] * 4, np.int32),
        positions_T=np.array([*range(8), *range(4)], np.int32),
        steps_T=np.array([0] * 6 + [1, 2] + [3] * 3 + [4], np.int32),
        prefill_T=np.array([1] * 6 + [0, 0] + [1] * 3 + [0], np.uint8),
        experts_LTK=ids,
        weights_LTK=rng.random((layers, tokens, slots)).astype(np.float16),
        num_experts=experts,
        model="f" * 64,
        logits_LTE=rng.random((layers, tokens, 6)).astype(np.float16),
        info={"made by": "a test"},
    )


def equal(a: Trace, b: Trace) -> bool:
    names = [n for n in Trace.__slots__ if n not in ("num_experts", "model", "info")]
    same = all((getattr(a, n) is None and getattr(b, n) is None) or np.array_equal(getattr(a, n), getattr(b, n)) for n in names)
    return same and (a.num_experts, a.model, a.info) == (b.num_experts, b.model, b.info)


def test_round_trip(trace, tmp_path):
    trace.save(tmp_path / "deep" / "a.trace")
    read = Trace.open(tmp_path / "deep" / "a.trace")
    assert equal(trace, read) and read.ahead_LTK is None
    assert isinstance(read.experts_LTK, np.memmap)
    assert os.listdir(tmp_path / "deep") == ["a.trace"], "no temporary file stays"


def test_a_trace_is_a_safetensors_file(trace, tmp_path):
    trace.save(tmp_path / "a.trace")
    with safe_open(tmp_path / "a.trace", "numpy") as f:
        assert (f.get_tensor("experts_LTK") == trace.experts_LTK).all()
        assert json.loads(f.metadata()["moestro_trace"])["num_experts"] == [4, 6, 6]


def test_an_empty_trace(trace, tmp_path):
    none = {n: getattr(trace, n)[:0] for n in ("tokens_T", "sequences_T", "positions_T", "steps_T", "prefill_T")}
    empty = Trace(
        **none, experts_LTK=trace.experts_LTK[:, :0], weights_LTK=trace.weights_LTK[:, :0], num_experts=(4, 6, 6), model="x"
    )
    empty.save(tmp_path / "a.trace")
    read = Trace.open(tmp_path / "a.trace")
    assert read.tokens == 0 and read.layers == 3 and list(read.steps()) == [] and read.counts().sum() == 0


def test_counts(trace):
    counts_LE = trace.counts()
    assert counts_LE.sum(1).tolist() == [12, 24, 24]
    assert counts_LE[1, 3] == (trace.experts_LTK[1] == 3).sum() and counts_LE[0, 4:].sum() == 0


def test_transitions(trace):
    counts_EE = trace.transitions(1)
    assert counts_EE.shape == (6, 6) and counts_EE.sum() == 12 * 2 * 2
    wanted = sum(int(2 in trace.experts_LTK[1, t] and 5 in trace.experts_LTK[2, t]) for t in range(12))
    assert counts_EE[2, 5] == wanted
    assert trace.transitions(0).sum() == 12 * 2, "padding takes no part"


def test_steps(trace):
    steps = list(trace.steps())
    assert [(s.step, s.prefill, s.rows.start, s.rows.stop) for s in steps] == [
        (0, True, 0, 6),
        (1, False, 6, 7),
        (2, False, 7, 8),
        (3, True, 8, 11),
        (4, False, 11, 12),
    ]


@pytest.mark.parametrize("keep", [0, 5, 8, 60, 0.5, 0.99])
def test_a_truncated_file_is_refused(trace, tmp_path, keep):
    path = tmp_path / "a.trace"
    trace.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    with pytest.raises(TraceError, match="not a readable trace") as caught:
        Trace.open(path)
    assert caught.value.fix and caught.value.exit_code == 2


def rewrite(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("experts_LTK"),
        lambda h: h.pop("__metadata__"),
        lambda h: h["tokens_T"].update(dtype="BF16"),
        lambda h: h["tokens_T"].update(shape=[11]),
        lambda h: h["weights_LTK"].update(data_offsets=[0, 10**9]),
        lambda h: h["__metadata__"].update(moestro_trace='{"format": 99, "model": "", "num_experts": [], "info": {}}'),
        lambda h: h["__metadata__"].update(moestro_trace='{"format": 1, "model": "", "num_experts": [4], "info": {}}'),
        lambda h: h["__metadata__"].update(moestro_trace="["),
    ],
)
def test_a_lying_header_is_refused(trace, tmp_path, change):
    path = tmp_path / "a.trace"
    trace.save(path)
    rewrite(path, change)
    with pytest.raises(TraceError, match="not a readable trace"):
        Trace.open(path)


def test_no_file(tmp_path):
    with pytest.raises(TraceError, match="there is no trace"):
        Trace.open(tmp_path / "a.trace")


def test_another_models_trace_is_refused(trace):
    trace.check_model("f" * 64)
    with pytest.raises(TraceError, match="recorded on the model"):
        trace.check_model("0" * 64)


def test_a_target_that_cannot_be_written(trace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        trace.save(tmp_path / "file" / "a.trace")
    (tmp_path / "old.trace").write_text("old")
    (tmp_path / "old.trace.partial").mkdir()  # in the way
    with pytest.raises(StorageError):
        trace.save(tmp_path / "old.trace")
    assert (tmp_path / "old.trace").read_text() == "old", "a failed save leaves the old file"
