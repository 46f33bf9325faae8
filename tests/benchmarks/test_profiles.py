"""The parts of the profiling benchmark that need no large model, at a tiny size."""

import sys
from pathlib import Path

import numpy as np

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import profiles as bench  # noqa: E402


def test_statistics_and_trace():
    (row,), trace = bench.statistics_cost(1024)
    assert row["tokens"] == 1024 and 0 < row["mb"] < 200 and row["us_per_token"] > 0 and row["probes"] >= 9
    assert trace.tokens == 1024 and trace.counts().sum() == 1024 * 16 * 8
    first, *replays = bench.trace_cost(trace)
    assert first["bytes_per_slot"] < 3 and first["open_s"] < 1
    assert [(r["scope"], r["form"], r["tokens"], r["budgets"]) for r in replays] == [
        (scope, form, 1024, 10) for scope in ("global", "layer") for form in ("sequences read whole", "token by token")
    ]


def test_a_decoders_form_has_a_pass_per_token():
    _, trace = bench.statistics_cost(512)
    made = bench.by_token(trace)
    assert [s.rows.stop - s.rows.start for s in made.steps()] == [1] * 512
    assert np.array_equal(made.experts_LTK, trace.experts_LTK) and not any(s.prefill for s in made.steps())


def test_no_benchmark_hides_a_module_of_python():
    assert not {path.stem for path in BENCHMARKS.glob("*.py")} & set(sys.stdlib_module_names)
