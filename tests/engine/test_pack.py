import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from moestro.core.errors import CheckpointError, InputError, PlanError, StorageError
from moestro.core.experts import ExpertKey
from moestro.core.plans.residency import Precision
from moestro.engine import pack as packing
from moestro.engine.pack import apply, pack
from moestro.engine.sample import SamplingParams
from moestro.engine.store import PackedStore, SourceStore, load
from moestro.kernels.reader import Reader
from moestro.models.codecs.encode import ROUNDED
from moestro.testing.tiny import save_tiny

TOKENS = [int(t) for t in np.random.default_rng(7).integers(3, 128, 30)]
WIDE = {"hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("mixtral", None, "float32"),
        ("qwen3_moe", "fused", "bfloat16"),
        ("gpt_oss", "fused", "bfloat16"),
        ("gpt_oss", "mxfp4", "bfloat16"),
        ("llama4_text", None, "float16"),
    ],
)
def test_stored_is_exact(family, layout, dtype, tmp_path, tiny, opened, make_plan, engine):
    folder, _ = tiny(family, layout, dtype)
    checkpoint, found = opened(folder)
    calls = []
    out = apply(make_plan(found), checkpoint, found, tmp_path / "packed", lambda done, total: calls.append((done, total)))
    total = sum(la.num_experts for la in found.facts.layers)
    assert calls == [(i + 1, total) for i in range(total)]
    assert sorted(p.name for p in out.iterdir()) == ["experts.bin", "experts.json"]
    assert PackedStore(out, found.facts).trunk() is None
    store = PackedStore(out, found.facts)
    assert not store.changes
    a, b = engine(folder, "minimal"), engine(folder, "minimal", store=store)
    np.testing.assert_array_equal(*(next(e.run([TOKENS])).logits_TV for e in (a, b)))
    assert b.changes == ()
    assert pack(checkpoint, found, "stored", out) == out  # again: nothing to do


LOSSES = {
    "f32": 1e-6,
    "bf16": 2e-2,
    "f16": 2e-3,
    "int8:32": 2e-2,
    "int4:32": 0.3,
    "uint4:32": 0.3,
    "int3:32": 0.5,
    "int2:32": 1,
    "mxfp4": 0.3,
}


@pytest.mark.parametrize(("codec", "close"), [*LOSSES.items(), ("nested:32", 0.4)])
def test_other_codecs_run_and_say_that_they_change_numbers(codec, close, tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, found = opened(folder)
    store = PackedStore(pack(checkpoint, found, codec, tmp_path / "p"), found.facts)
    tiled = codec not in ("f32", "bf16", "f16")
    assert store.changes == (() if codec == "f32" else (f"experts are kept as {codec}",)) + ((ROUNDED,) if tiled else ())
    source = SourceStore(checkpoint, found)
    with Reader() as reader:
        store.attach(reader), source.attach(reader)
        for e in range(4):
            (a, _x), (b, _y) = (load(s, reader, ExpertKey(1, e)) for s in (source, store))
            for name in ("gate", "up", "down"):
                exact, coded = getattr(a, name).dequantise(), getattr(b, name).dequantise()
                error = np.abs(exact - coded).max() / np.abs(exact).max()
                assert error <= close
                assert (error > 0) == bool(store.changes)
    made = engine(folder, store=PackedStore(store.folder, found.facts))
    generation = made.generate(TOKENS, SamplingParams(max_tokens=3, ignore_eos=True))
    generation.run()
    assert generation.statistics.exact == (codec == "f32")
    said = generation.statistics.summary()
    assert ("SHRUNK: experts are kept as" in said) == bool(store.changes) and (ROUNDED in said) == tiled


def test_a_codec_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])
    for codec in ("int3", "int8:128", "nested:64/3", "mixed"):
        with pytest.raises(InputError):
            pack(checkpoint, found, codec, tmp_path / "p")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop_after", [1, 5])
def test_interrupted_packing_continues(stop_after, tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])
    whole = pack(checkpoint, found, "stored", tmp_path / "whole")

    def stop(done, total):
        if done == stop_after:
            raise KeyboardInterrupt

    out = tmp_path / "p"
    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, found, "stored", out, stop)
    assert not out.exists()
    written = []
    real = packing._write
    try:
        packing._write = lambda file, record, at: (written.append(at), real(file, record, at))
        pack(checkpoint, found, "stored", out)
    finally:
        packing._write = real
    assert len(written) == sum(la.num_experts for la in found.facts.layers) - stop_after
    for name in ("experts.bin", "experts.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "p.partial").exists()


def test_kill_in_the_middle_and_continue(tmp_path, tiny, opened):
    folder, _ = tiny("mixtral")
    out = tmp_path / "p"
    code = (
        "import sys, time\nfrom moestro.engine.pack import pack\nfrom moestro.models.checkpoint import Checkpoint\n"
        "from moestro.models.families import describe\nc = Checkpoint.open(sys.argv[1])\n"
        "pack(c, describe(c), 'stored', sys.argv[2], lambda d, t: (print(d, flush=True), time.sleep(0.05)))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(folder), str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "4":
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    child.stdout.close()
    assert not out.exists() and (tmp_path / "p.partial").exists()
    checkpoint, found = opened(folder)
    pack(checkpoint, found, "stored", out)
    with Reader() as reader:
        store = PackedStore(out, found.facts)
        store.attach(reader)
        for layer in found.facts.layers:
            for e in range(layer.num_experts):
                load(store, reader, ExpertKey(layer.ordinal, e))  # checks every digest


def test_a_damaged_partial_record_is_written_again(tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])
    whole = pack(checkpoint, found, "stored", tmp_path / "whole")

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, found, "stored", tmp_path / "p", stop)
    partial = tmp_path / "p.partial"
    with open(partial / "experts.bin", "r+b") as f:
        f.write(b"damage")
    with open(partial / "journal.jsonl", "a") as f:
        f.write("[0, 1")  # a line cut short
    pack(checkpoint, found, "stored", tmp_path / "p")
    assert (tmp_path / "p" / "experts.bin").read_bytes() == (whole / "experts.bin").read_bytes()


def test_partial_work_of_another_codec_is_not_mixed_in(tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, found, "bf16", tmp_path / "p", stop)
    out = pack(checkpoint, found, "stored", tmp_path / "p")
    assert json.loads((out / "experts.json").read_text())["codec"] == "stored"


def test_other_weights_in_the_same_shapes_are_found(tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])
    other, other_found = opened(save_other(tmp_path / "other"))
    assert found.facts.fingerprint == other_found.facts.fingerprint, "headers, configuration and sizes tell nothing"
    out = pack(checkpoint, found, "stored", tmp_path / "p")
    PackedStore(out, found.facts).made_from(checkpoint, found)
    with pytest.raises(CheckpointError, match="other weights"):
        PackedStore(out, other_found.facts).made_from(other, other_found)
    with pytest.raises(CheckpointError, match="other weights"):
        pack(other, other_found, "stored", out)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, found, "stored", tmp_path / "q", stop)
    pack(other, other_found, "stored", tmp_path / "q")
    pack(other, other_found, "stored", tmp_path / "whole")
    assert (tmp_path / "q" / "experts.bin").read_bytes() == (tmp_path / "whole" / "experts.bin").read_bytes()


def save_other(folder):
    save_tiny("mixtral", folder, seed=1)
    return folder


def test_an_expert_that_cannot_be_read_is_no_storage_error(tmp_path, tiny, opened, monkeypatch):
    checkpoint, found = opened(tiny("mixtral")[0])

    def broken(self, ticket):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Reader, "wait", broken)
    with pytest.raises(CheckpointError, match=r"MoE layer 0, expert 0 cannot be read.*Input/output error"):
        pack(checkpoint, found, "stored", tmp_path / "p")


def test_a_full_disk_is_a_storage_error_and_packing_goes_on_later(tmp_path, tiny, opened, monkeypatch):
    checkpoint, found = opened(tiny("mixtral")[0])
    real, calls = os.pwrite, []

    def full(file, data, at):
        calls.append(at)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            pack(checkpoint, found, "stored", tmp_path / "p")
    assert not (tmp_path / "p").exists()
    assert (pack(checkpoint, found, "stored", tmp_path / "p") / "experts.json").exists()


def test_too_little_space_is_said_before_writing(tmp_path, tiny, opened, monkeypatch):
    checkpoint, found = opened(tiny("mixtral")[0])
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StorageError, match="1000 bytes free"):
        pack(checkpoint, found, "stored", tmp_path / "p")


def test_something_else_in_the_way(tmp_path, tiny, opened):
    checkpoint, found = opened(tiny("mixtral")[0])
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="holds no packed experts"):
        pack(checkpoint, found, "stored", tmp_path / "file")
    out = pack(checkpoint, found, "stored", tmp_path / "p")
    with pytest.raises(StorageError, match="codec stored"):
        pack(checkpoint, found, "f16", out)


def test_mxfp4_in_tiles_keeps_the_weights_and_rounds_activations(tmp_path, tiny, opened, engine):
    folder, _ = tiny("gpt_oss", "mxfp4", "bfloat16")
    checkpoint, found = opened(folder)
    store = PackedStore(pack(checkpoint, found, "mxfp4", tmp_path / "p"), found.facts)
    assert store.changes == (ROUNDED,)
    a, b = (
        next(engine(folder, "minimal").run([TOKENS])).logits_TV,
        next(engine(folder, "minimal", store=store).run([TOKENS])).logits_TV,
    )
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_coarser_experts_are_the_beginning_of_nested_records(tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, found = opened(folder)
    out = pack(checkpoint, found, "nested:32", tmp_path / "p")
    shape = [la.num_experts for la in found.facts.layers]
    read, errors = [], []
    exact = next(engine(folder).run([TOKENS])).logits_TV
    for planes in (2, 3, 4):
        store = PackedStore(out, found.facts)
        store.limit([[planes] * n for n in shape])
        made = engine(folder, "minimal", store=store)
        errors.append(float(np.square(next(made.run([TOKENS])).logits_TV - exact).mean()))
        read.append(made.reader.bytes_read / store.slot_bytes)
        assert any("bits are used" in change for change in made.changes) == (planes < 4)
    assert errors[0] > errors[1] > errors[2] > 0 and len(set(read)) == 1, "as many reads, each of a slot"
    mixed = PackedStore(out, found.facts)
    mixed.limit([[2 + (la + e) % 3 for e in range(n)] for la, n in enumerate(shape)])
    assert "2 by 4 experts" in mixed.changes[-1]
    assert np.square(next(engine(folder, store=mixed).run([TOKENS])).logits_TV - exact).mean() < errors[0]
    with pytest.raises(InputError, match="no planes to leave out"):
        PackedStore(pack(checkpoint, found, "int4:32", tmp_path / "q"), found.facts).limit([[2] * n for n in shape])


def test_each_expert_may_have_its_own_width(tmp_path, tiny, opened, make_plan, engine):
    folder, _ = tiny("mixtral", **WIDE)
    checkpoint, found = opened(folder)
    rows = tuple(tuple((la.ordinal + e) % 2 for e in range(la.num_experts)) for la in found.facts.layers)
    widths = Precision("by hand", ("int2:32", "int8:32"), rows)
    plan = make_plan(found, codec="mixed", precision=widths)
    out = apply(plan, checkpoint, found, tmp_path / "p")
    store = PackedStore(out, found.facts)
    assert store.precision() == Precision("engine.pack", widths.widths, rows)
    assert store.codec_of(ExpertKey(1, 1)).name == "int2:32" and store.codec_of(ExpertKey(1, 2)).name == "int8:32"
    exact = next(engine(folder).run([TOKENS])).logits_TV
    errors = [np.abs(next(engine(folder, store=store, precision=widths).run([TOKENS])).logits_TV - exact).max()]
    for codec in ("int2:32", "int8:32"):
        alone = PackedStore(pack(checkpoint, found, codec, tmp_path / codec), found.facts)
        errors.append(np.abs(next(engine(folder, store=alone).run([TOKENS])).logits_TV - exact).max())
    assert errors[1] > errors[0] > errors[2]
    with pytest.raises(PlanError, match="kept otherwise"):
        other = replace(widths, experts_LE=tuple(tuple(1 - i for i in row) for row in rows))
        engine(folder, store=PackedStore(out, found.facts), precision=other)
    with pytest.raises(StorageError, match="same width"):
        pack(checkpoint, found, "mixed", out, widths=other)


def test_damage_truncation_and_other_models_are_found(tmp_path, tiny, opened, engine):
    folder, _ = tiny("mixtral")
    checkpoint, found = opened(folder)
    out = pack(checkpoint, found, "stored", tmp_path / "p")
    with pytest.raises(CheckpointError, match="made from the model"):
        PackedStore(out, opened(tiny("olmoe")[0])[1].facts)
    with open(out / "experts.bin", "r+b") as f:
        f.seek(100)
        f.write(b"\x00\x01\x02")
    made = engine(folder, store=PackedStore(out, found.facts))
    with pytest.raises(CheckpointError, match="expert 0: its record"):
        made.generate(TOKENS).run()
    with open(out / "experts.bin", "r+b") as f:
        f.truncate(5000)
    with pytest.raises(CheckpointError, match="5000 bytes"):
        PackedStore(out, found.facts)
    (out / "experts.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not hold packed experts"):
        PackedStore(out, found.facts)
