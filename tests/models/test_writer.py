"""CheckpointWriter and edit_checkpoint: what is written opens elsewhere, and nothing half-written is ever visible."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moestro.core.errors import CheckpointError, InputError, StorageError
from moestro.models.checkpoint import INDEX, Checkpoint
from moestro.models.writer import CheckpointWriter, Edits, Made, edit_checkpoint

RNG = np.random.default_rng(1)
ARRAYS = {f"t{i}": RNG.standard_normal((16, 8)).astype(np.float32) for i in range(6)}  # 512 bytes each
CONFIG = {"model_type": "mixtral", "sizes": (1, 2)}


def write(folder: Path, **options: Any) -> Checkpoint:
    with CheckpointWriter(folder, CONFIG, **options) as writer:
        for name, array in ARRAYS.items():
            writer.add(name, array)
        return writer.finish()


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def same(c: Checkpoint, arrays: dict[str, np.ndarray]) -> None:
    assert list(c.tensors) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(c.read(name), array)


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1 << 30, 1), (1100, 3), (512, 6), (1, 6)])
def test_shards(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    c = write(tmp_path / "m", shard_bytes=shard_bytes)
    same(c, ARRAYS)
    assert c.config == {"model_type": "mixtral", "sizes": [1, 2]}
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    assert everything(tmp_path) == sorted(["m", *(f"m/{n}" for n in [*names, "config.json", *([INDEX] if shards > 1 else [])])])
    seen: dict[str, str] = {}
    for file in c.files:
        with safe_open(file, "np") as f:
            assert f.metadata() == {"format": "pt"}
            for name in f.keys():  # noqa: SIM118
                np.testing.assert_array_equal(f.get_tensor(name), ARRAYS[name])
                seen[name] = file.name
        assert min(ref.offset for ref in c.tensors.values() if ref.file == file) % 4096 == 0
    assert set(seen) == set(ARRAYS)
    if shards > 1:
        index = json.loads((c.path / INDEX).read_text())
        assert index == {"metadata": {"total_size": 6 * 512}, "weight_map": seen}


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=30), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8),
    st.integers(1, 200),
    st.sampled_from(["F32", "F16", "I64", "U8", "BOOL"]),
)
def test_any_names_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[int, int]], shard_bytes: int, dtype: str
) -> None:
    kind = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8, "BOOL": np.bool_}[dtype]
    shapes.pop("__metadata__", None)
    arrays = {name: RNG.integers(0, 2, shape).astype(kind) for name, shape in shapes.items()}
    with CheckpointWriter(tmp_path_factory.mktemp("w") / "m", {}, shard_bytes=shard_bytes) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        same(writer.finish(), arrays)


def test_many_tensors_overflow_a_header_into_another_shard(tmp_path: Path) -> None:
    arrays = {f"model.layers.0.mlp.experts.{i}.gate_proj.weight": np.full(1, i, np.float32) for i in range(1500)}
    with CheckpointWriter(tmp_path / "m", {}) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
        c = writer.finish()
    assert len(c.files) == 2
    same(c, arrays)


def test_strided_arrays_and_bf16(tmp_path: Path) -> None:
    big = RNG.integers(0, 1 << 16, (700, 9000), dtype=np.uint16)
    with CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.add("t", big.T, "BF16")
        writer.add("scalar", np.array(2.5, np.float32))
        writer.stream("pieces", "U8", (4, 2), [np.arange(3, dtype=np.uint8), np.zeros(0, np.uint8), np.arange(5, dtype=np.uint8)])
        c = writer.finish()
    np.testing.assert_array_equal(c.read("t"), big.T)
    assert c.ref("t").dtype == "BF16" and c.read("scalar") == 2.5
    assert c.read("pieces").ravel().tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_wrong_sizes_are_programmer_errors_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="3 came"), CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.stream("a", "U8", (4,), [np.zeros(3, np.uint8)])
    with pytest.raises(AssertionError, match="cannot be stored as F16"), CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.add("a", np.zeros(3, np.float32), "F16")
    with pytest.raises(AssertionError, match="twice"), CheckpointWriter(tmp_path / "m", {}) as writer:
        writer.add("a", np.zeros(3, np.float32))
        writer.add("a", np.zeros(3, np.float32))
    assert everything(tmp_path) == []


def test_opens_in_transformers_and_edits_change_only_what_they_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates/rag.jinja",
    ):
        (tmp_path / "source" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "source" / name).write_text(name)
    (tmp_path / "source" / "README.md").write_text("about the source")
    source = Checkpoint.open(tmp_path / "source")
    copied = edit_checkpoint(source, tmp_path / "copy", Edits(), shard_bytes=4000)
    assert len(copied.files) > 3
    assert copied.config == source.config and set(copied.tensors) == set(source.tensors)
    kept = everything(tmp_path / "copy")
    assert {"tokenizer.json", "generation_config.json", "LICENSE", "additional_chat_templates/rag.jinja"} <= set(kept)
    assert "README.md" not in kept
    ids = torch.arange(10)[None]
    with torch.no_grad():
        want = model(ids).logits
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
        assert torch.equal(again(ids).logits, want)
        # A permuted vocabulary output: replaced by what it was, rows reversed.
        head = source.read("lm_head.weight")
        reverse = Made("F32", head.shape, lambda: head[::-1])
        edit_checkpoint(source, tmp_path / "edited", Edits(replace={"lm_head.weight": reverse}))
        edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
        torch.testing.assert_close(edited(ids).logits, want.flip(-1))


def test_edits(tmp_path: Path) -> None:
    source = write(tmp_path / "m")
    new = Made("F32", (2,), lambda: np.ones(2, np.float32))
    edits = Edits(rename={"t0": "first", "t1": "t0"}, remove=["t2"], replace={"t1": new, "t3": new}, add={"t2": new})
    out = edit_checkpoint(source, tmp_path / "n", edits, config={"x": 1})
    ones = np.ones(2, np.float32)
    same(out, {"first": ARRAYS["t0"], "t0": ones, "t2": ones, "t3": ones, "t4": ARRAYS["t4"], "t5": ARRAYS["t5"]})
    assert out.config == {"x": 1}


def test_edits_that_cannot_be(tmp_path: Path) -> None:
    source = write(tmp_path / "m")
    new = Made("F32", (2,), lambda: np.ones(2, np.float32))
    for edits, says in [
        (Edits(rename={"nope": "x"}), "no tensor nope"),
        (Edits(remove=["t0"], replace={"t0": new}), "both removed and changed"),
        (Edits(rename={"t0": "t1"}), "two tensors the name t1"),
        (Edits(add={"t1": new}), "two tensors the name t1"),
    ]:
        with pytest.raises(InputError, match=says):
            edit_checkpoint(source, tmp_path / "n", edits)
    with pytest.raises(InputError, match="being read"):
        edit_checkpoint(source, tmp_path / "m", Edits(), overwrite=True)
    assert everything(tmp_path) == ["m", "m/config.json", "m/model.safetensors"]


def test_a_source_that_changes_while_it_is_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "m")

    def change() -> np.ndarray:
        os.utime(source.files[0], ns=(5, 5))
        return np.ones(2, np.float32)

    with pytest.raises(CheckpointError, match="changed since"):
        edit_checkpoint(source, tmp_path / "n", Edits(add={"new": Made("F32", (2,), change)}))
    assert not (tmp_path / "n").exists() and not (tmp_path / "n.partial").exists()


def test_existing_targets(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write(tmp_path / "m")  # an empty folder is no obstacle
    with pytest.raises(StorageError, match="exists already"):
        write(tmp_path / "m")
    (tmp_path / "m" / "old.txt").write_text("old")
    same(write(tmp_path / "m", overwrite=True), ARRAYS)
    assert everything(tmp_path) == ["m", "m/config.json", "m/model.safetensors"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        write(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot be written"):
        write(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_failed_overwrite_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m")
    disk_full(monkeypatch, after=2)
    with pytest.raises(StorageError):
        write(tmp_path / "m", overwrite=True)
    monkeypatch.undo()
    same(Checkpoint.open(tmp_path / "m"), ARRAYS)
    assert everything(tmp_path) == ["m", "m/config.json", "m/model.safetensors"]


def disk_full(monkeypatch: pytest.MonkeyPatch, after: int, code: int = errno.ENOSPC) -> None:
    real, calls = os.pwrite, 0

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(code, os.strerror(code))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("after", range(12))
def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    disk_full(monkeypatch, after)
    with pytest.raises(StorageError, match=r"No space left.*\n.*room for the whole") as caught:
        write(tmp_path / "m", shard_bytes=512)
    assert everything(tmp_path) == [] and "kept" not in str(caught.value)


@pytest.mark.parametrize("after", range(12))
def test_disk_full_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    with monkeypatch.context() as patch:
        disk_full(patch, after)
        with pytest.raises(StorageError) as caught:
            write(tmp_path / "m", shard_bytes=512, resume_key="k")
    complete = after // 2  # two writes a shard: data and header
    assert len(list(tmp_path.glob("m.partial/*.safetensors"))) == complete
    assert ("kept" in str(caught.value)) == (complete > 0) == (tmp_path / "m.partial").exists()
    counted: list[str] = []
    with CheckpointWriter(tmp_path / "m", CONFIG, shard_bytes=512, resume_key="k") as writer:
        for name, array in ARRAYS.items():
            counted += [name] if name in writer else []
            writer.add(name, array)
        same(writer.finish(), ARRAYS)
    assert counted == list(ARRAYS)[:complete]
    assert not (tmp_path / "m.partial").exists()


@pytest.mark.parametrize("spoil", ["another key", "no key", "another config", "shard cut", "shard gone", "journal broken"])
def test_what_cannot_be_resumed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str) -> None:
    with monkeypatch.context() as patch:
        disk_full(patch, 9)
        with pytest.raises(StorageError):
            write(tmp_path / "m", shard_bytes=512, resume_key="k")
    shard = tmp_path / "m.partial" / "shard-00002.safetensors"
    if spoil == "shard cut":
        os.truncate(shard, 1000)
    elif spoil == "shard gone":
        shard.unlink()
    elif spoil == "journal broken":
        (tmp_path / "m.partial" / "journal.json").write_text("{")
    key = {"another key": "j", "no key": ""}.get(spoil, "k")
    config = {"other": 1} if spoil == "another config" else CONFIG
    with CheckpointWriter(tmp_path / "m", config, shard_bytes=512, resume_key=key) as writer:
        assert [n for n in ARRAYS if n in writer] == (["t0"] if spoil.startswith("shard") else [])
        for name, array in ARRAYS.items():
            writer.add(name, array)
        same(writer.finish(), ARRAYS)
    assert "m.partial" not in everything(tmp_path)


def test_killed_in_the_middle_then_resumed(tmp_path: Path) -> None:
    code = f"""
import os, numpy as np
from moestro.models.writer import CheckpointWriter
w = CheckpointWriter({str(tmp_path / "m")!r}, {{}}, shard_bytes=40, resume_key="k")
for i in range(5):
    w.add(f"t{{i}}", np.full(10, i, np.float32))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert everything(tmp_path)[0] == "m.partial" and not (tmp_path / "m").exists()
    with CheckpointWriter(tmp_path / "m", {}, shard_bytes=40, resume_key="k") as writer:
        kept = [i for i in range(6) if f"t{i}" in writer]
        assert kept in ([0, 1, 2], [0, 1, 2, 3])  # the fifth was in the open shard, the fourth perhaps on its way to the disk
        for i in range(6):
            writer.add(f"t{i}", np.full(10, i, np.float32))
        same(writer.finish(), {f"t{i}": np.full(10, i, np.float32) for i in range(6)})


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    code = f"""
import numpy as np
from moestro.core.errors import StorageError
from moestro.models.writer import CheckpointWriter
try:
    with CheckpointWriter({str(tmp_path / "m")!r}, {{}}) as w:
        w.add("t", np.zeros(1 << 20, np.float32))
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    assert "cannot be written: File too large" in done.stdout
    assert everything(tmp_path) == []


def test_read_only_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match=r"Read-only file system[^$]*you can write to"):
        CheckpointWriter(tmp_path / "m", {})


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "m", {}) as first:
        first.add("a", ARRAYS["t0"])
        with pytest.raises(StorageError, match="another process is writing"):
            CheckpointWriter(tmp_path / "m", {})
        same(first.finish(), {"a": ARRAYS["t0"]})


def test_interrupt_leaves_only_what_can_be_resumed(tmp_path: Path) -> None:
    for key, left in [("", []), ("k", ["m.partial"])]:
        with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "m", {}, shard_bytes=1, resume_key=key) as writer:
            writer.add("a", ARRAYS["t0"])
            writer.add("b", ARRAYS["t1"])
            raise KeyboardInterrupt
        assert [p.name for p in tmp_path.iterdir()] == left
    assert len(list(tmp_path.glob("m.partial/*.safetensors"))) == 1


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """Copies a checkpoint of 200 MB with at most 80 MB more than at the start."""
    with CheckpointWriter(tmp_path / "m", {}) as writer:
        for i in range(5):
            writer.add(f"t{i}", np.full(10_000_000, i, np.float32))
        writer.finish()
    code = f"""
import resource
from moestro.models.checkpoint import Checkpoint
from moestro.models.writer import Edits, edit_checkpoint
source = Checkpoint.open({str(tmp_path / "m")!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
edit_checkpoint(source, {str(tmp_path / "n")!r}, Edits())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000
