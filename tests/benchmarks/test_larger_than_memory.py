"""The benchmark's own parts, and the whole of it at a tiny size."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import larger_than_memory as bench  # noqa: E402
import limits  # noqa: E402
import peers  # noqa: E402
import shapes  # noqa: E402

TINY = shapes.Shape(layers=2, width=128, experts=16, top_k=4, expert_width=64, heads=1, vocabulary=1024)


def quiet(text: str) -> None: ...


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return shapes.write_checkpoint(tmp_path_factory.mktemp("shapes") / "tiny", TINY, shard_bytes=1_000_000, say=quiet)


def test_checkpoint_is_what_safetensors_reads(checkpoint):
    from safetensors import safe_open

    seen = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            seen |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
    assert seen == TINY.tensors()
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(seen) and len(set(index["weight_map"].values())) > 2
    source = shapes.Shards(checkpoint)
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(16)]
    assert len({source.read(n).tobytes() for n in names}) == len(names)
    w = shapes.from_bf16(source.read(names[0]))
    assert np.isfinite(w).all() and 0.5 < w.std() * np.sqrt(TINY.width) < 2


def test_interrupted_writing_continues_to_the_same_bytes(checkpoint, tmp_path):
    shards = sorted(checkpoint.glob("*.safetensors"))
    again = shapes.write_checkpoint(tmp_path / "again", TINY, shard_bytes=1_000_000, say=quiet)
    kept = (again / shards[0].name).stat().st_mtime_ns
    (again / shards[1].name).write_bytes(b"cut short")
    (again / shards[2].name).unlink()
    shapes.write_checkpoint(again, TINY, shard_bytes=1_000_000, say=quiet)
    assert all((again / s.name).read_bytes() == s.read_bytes() for s in shards)
    assert (again / shards[0].name).stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match="another shape"):
        shapes.write_checkpoint(again, replace(TINY, seed=1), say=quiet)


def test_scale_one_is_olmoe():
    shape = shapes.Shape.scaled(1.0)
    assert shape == shapes.Shape()
    assert sum(2 * int(np.prod(s)) for s in shape.tensors().values()) == 13_838_323_712  # OLMoE-1B-7B's bf16 bytes
    small = shapes.Shape.scaled(0.1)
    total = sum(2 * int(np.prod(s)) for s in small.tensors().values())
    assert 0.05 < total / 13_838_323_712 < 0.2 and small.experts == 64


def test_every_format_computes_the_same_function_and_walks(checkpoint, tmp_path):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="the peer is compiled by who wants to compare: pip install llama-cpp-python"
    )
    import torch
    import transformers

    fused = peers.write_fused(checkpoint, tmp_path / "fused", TINY, say=quiet)
    gguf = peers.write_gguf(checkpoint, tmp_path / "tiny.gguf", TINY, matrices="f32", say=quiet)
    ids = shapes.prompt(TINY, "chain", 24, 1) + shapes.prompt(TINY, "uniform", 24, 1)
    logits = {}
    for folder in (checkpoint, fused):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits[folder] = model(torch.tensor([ids])).logits[0].numpy()
    assert np.array_equal(logits[checkpoint], logits[fused])
    llama = llama_cpp.Llama(str(gguf), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    llama.eval(ids)
    theirs = np.array(llama.scores[: len(ids)])
    llama.close()
    assert np.isfinite(theirs).all() and np.abs(theirs - logits[checkpoint]).max() < 1e-3
    follows = logits[checkpoint].argmax(-1)[:-1] == np.array(ids[1:])
    assert follows[np.arange(47) != 23].mean() > 0.9  # 23 is where one walk ends and the other begins


def test_bf16_gguf_holds_the_checkpoint_s_bits(checkpoint, tmp_path):
    import gguf

    path = peers.write_gguf(checkpoint, tmp_path / "tiny.gguf", TINY, say=quiet)
    source = shapes.Shards(checkpoint)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    stacked = np.stack([source.read(f"model.layers.1.mlp.experts.{e}.down_proj.weight") for e in range(16)])
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    assert tensors["blk.1.ffn_down_exps.weight"].data.tobytes() == stacked.tobytes()


def _needs_limit():
    try:
        limits.require()
    except limits.Unlimited as error:
        pytest.skip(str(error))


def test_child_is_held_to_the_limit_and_counted():
    _needs_limit()
    hold = "x = bytearray(48 << 20); import time; time.sleep(.3); print('{\"done\": 1}')"
    inside = limits.run([sys.executable, "-c", hold], limit=96 << 20, timeout=30)
    assert inside.result() == {"done": 1} and inside.peak is not None and 48 << 20 <= inside.peak <= 96 << 20
    assert inside.peak_anonymous is not None and 48 << 20 <= inside.peak_anonymous <= inside.peak
    outside = limits.run([sys.executable, "-c", hold], limit=32 << 20, timeout=30)
    assert outside.out_of_memory and "out of memory" in outside.result()["error"]
    root = limits.V1 if limits.version() == 1 else limits.V2
    assert not list(root.glob(f"moestro-bench-{limits.os.getpid()}-*"))


def test_slow_child_is_stopped_and_said():
    slow = limits.run([sys.executable, "-c", "import time; time.sleep(30)"], limit=None, timeout=0.5)
    assert slow.timed_out and slow.seconds < 10 and "too long" in slow.result()["error"]
    failed = limits.run([sys.executable, "-c", "raise SystemExit('broken')"], limit=None, timeout=10)
    assert "broken" in failed.result()["error"]


def test_read_ahead_is_restored_after_an_error(tmp_path, monkeypatch):
    (tmp_path / "read_ahead_kb").write_text("8192")
    monkeypatch.setattr(limits, "device_queue", lambda path: tmp_path)
    with pytest.raises(SystemExit), limits.read_ahead_of(tmp_path, 128) as now:
        assert now == 128
        limits.os.kill(limits.os.getpid(), limits.signal.SIGTERM)
        limits.time.sleep(1)
    assert limits.read_ahead(tmp_path) == 8192


def test_without_root_it_says_so_and_stops(monkeypatch, capsys):
    monkeypatch.setattr(limits.os, "geteuid", lambda: 1000)
    assert bench.main(["--scale", "0.004"]) == 2
    assert "root" in capsys.readouterr().err


def test_work_folder_inside_the_repository_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.arguments(["--work", str(BENCHMARKS / "results")])
    assert "inside the repository" in capsys.readouterr().err


def _session(seconds: float, *, misses: int = 0, read: int = 0, reading: float = 1.0) -> dict:
    engine = {"load": {}, "prefill": {}, "decode": {}}
    if misses:
        zero = dict.fromkeys(("hits", "misses", "prefetch_used", "prefetch_issued", "reader_bytes", "reader_seconds"), 0)
        seen = {"hits": 40, "misses": misses - 10, "prefetch_used": 10, "reader_bytes": read, "reader_seconds": reading}
        engine = {"load": zero, "prefill": zero, "decode": {**zero, **seen}}
    kernel = {p: {"read_bytes": read, "major_faults": 0} for p in ("load", "prefill", "decode")}
    return {
        "decode_seconds": [seconds] * 10, "prefill_seconds": 1.0, "prefill_tokens": 4, "load_seconds": 1.0, "kernel": kernel,
        "engine": engine, "about": {}, "resident": {}, "follows": 1.0, "answer": [1, 2],
    }  # fmt: skip


def test_bound_and_verdict_are_counted_by_hand():
    size = TINY.expert_bytes()

    def figures(session: dict, disk_rate: float, memory_rate: float = 1e12) -> dict:
        return bench.figures(session, TINY, 16, disk_rate, memory_rate)

    ours = figures(_session(0.1, misses=100, read=102 * size), disk_rate=125.0 * size)
    assert ours["bound_seconds"] == pytest.approx(0.8) and ours["bound_ratio"] == pytest.approx(0.8)
    assert ours["bytes_over_missed"] == pytest.approx(1.02) and ours["hit_rate"] == pytest.approx(30 / 130)
    assert ours["reader_rate"] == pytest.approx(102 * size)
    faster = figures(_session(0.1, misses=100, read=100 * size, reading=0.5), disk_rate=125.0 * size)
    assert faster["bound_seconds"] == pytest.approx(0.5), "the engine's own reads were faster than the probes"
    early = figures(_session(0.1, misses=100, read=100 * size, reading=4.0), disk_rate=50.0 * size)
    assert early["reader_rate"] == pytest.approx(100 * size), "all was read in the second there was, not in four"
    assert early["bound_ratio"] == pytest.approx(1.0) and early["reader_over_probe"] == pytest.approx(2.0)
    busy = figures(
        _session(0.1, misses=1, read=size), disk_rate=125.0 * size, memory_rate=sum(TINY.active_bytes(16).values()) / 0.09
    )
    assert busy["bound_seconds"] == pytest.approx(0.9), "ten tokens, whose weights take 90 ms each from memory"
    theirs = figures(_session(0.2, read=300 * size), disk_rate=125.0 * size)
    assert theirs["decode_rate"] == pytest.approx(5.0) and "bound_ratio" not in theirs
    where = {"budget": 1000, "locality": "chain", "start": 0, "kernel": {"peak": 900, "peak_anonymous": 500}}
    rows = bench.summarise([{"contender": "moestro", **where, **ours}, {"contender": "accelerate", **where, **theirs}])
    assert rows[1]["moestro_over_this"] == pytest.approx(2.0) and rows[1]["same_answer"]
    assert all(v is True for k, v in bench.verdict(rows, "bf16")[0].items() if k not in ("budget", "locality"))
    for changes in ({"reader_over_probe": 1.5}, {"bound_ratio": 1.2}):
        rows = bench.summarise([{"contender": "moestro", **where, **ours, **changes}])
        assert bench.verdict(rows, "bf16")[0]["at_least_80%_of_bound"] is None, "the probes did not see the disk that the run had"
    late = {**ours, "bound_ratio": 0.75, "bytes_over_missed": 1.2, "kernel": {"peak": 1100, "peak_anonymous": 1}}
    rows = bench.summarise([{"contender": "moestro", **where, **late}, {"contender": "accelerate", **where, "error": "killed"}])
    checks = bench.verdict(rows, "bf16")[0]
    assert checks["at_least_2.0_times_accelerate"] is None
    assert not any(checks[k] for k in checks if k not in ("budget", "locality"))
    assert "killed" in bench.table(rows)


def test_the_whole_benchmark_at_a_tiny_size(tmp_path, capsys):
    out = tmp_path / "result.json"
    options = ["--scale", "0.004", "--work", str(tmp_path), "--out", str(out), "--repeats", "1", "--prompt", "4", "--decode", "4"]
    options += ["--budgets", "1500MB", "--locality", "chain", "--accelerate", "disk/eager/fused", "--read-ahead", "0", "--warm"]
    others = ["accelerate", *(["llama.cpp"] if importlib.util.find_spec("llama_cpp") else [])]
    options += ["--contenders", ",".join(["moestro", *others])]
    try:
        limits.require()
    except limits.Unlimited:
        options.append("--no-limit")
    assert bench.main(options) == 0
    report = json.loads(out.read_text())
    rows = {r["contender"]: r for r in report["summary"]}
    assert set(rows) == {"moestro", *others}
    for row in rows.values():
        assert "error" not in row, row
        assert row["follows"] == 1.0 and row["decode_rate"] > 0 and row["same_answer"]
    assert rows["moestro"]["hit_rate"] > 0
    seen, guess = report["overlap"], report["expected_overlap"]
    assert 0.4 < seen["chain"] < guess["chain"] + 0.1 and guess["uniform"] < 0.3
    assert out.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
