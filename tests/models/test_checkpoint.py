"""Checkpoint: what it reads, and that every kind of damage is refused with a message that names it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moestro.core.errors import CheckpointError
from moestro.models.checkpoint import INDEX, Checkpoint, check_finite, read_header

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((3, 5)).astype(np.float32), RNG.integers(0, 9, (2, 2, 2)).astype(np.int64)


def folder(path: Path, **arrays: np.ndarray) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file(arrays or {"a": A, "b": B}, path / "model.safetensors")
    return path


def sharded(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({"a": A}, path / "model-00001-of-00002.safetensors")
    save_file({"b": B}, path / "model-00002-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A folder whose weights file has this header (object or bytes) and data."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("make", [folder, sharded])
def test_reads_what_was_written(tmp_path: Path, make: Callable[..., Path]) -> None:
    c = Checkpoint.open(make(tmp_path / "m"))
    assert list(c.tensors) == ["a", "b"] and c.nbytes == A.nbytes + B.nbytes
    np.testing.assert_array_equal(c.read("a"), A)
    np.testing.assert_array_equal(c.read("b"), B)
    out = np.zeros_like(A)
    c.read_into("a", out)
    np.testing.assert_array_equal(out, A)
    ref = c.ref("b")
    assert ref.file.read_bytes()[ref.offset : ref.offset + ref.nbytes] == B.tobytes()
    c.unchanged()


def test_bf16_comes_as_bit_patterns(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    folder(tmp_path)
    w = torch.randn(4, 3, dtype=torch.bfloat16)
    save_torch({"w": w}, tmp_path / "model.safetensors")
    got = Checkpoint.open(tmp_path).read("w")
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, w.view(torch.uint16).numpy())


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    c = Checkpoint.open(folder(tmp_path / "m", none=np.zeros((0, 4), np.float32), one=np.array(3, np.float32)))
    assert c.read("none").shape == (0, 4) and c.read("one") == 3


def test_reading_leaves_the_page_cache_alone(tmp_path: Path) -> None:
    """Counted by mincore through the resident set of a fresh map of the file."""
    import ctypes
    import mmap

    c = Checkpoint.open(folder(tmp_path / "m", w=np.ones(4 << 20, np.float32)))
    file = c.ref("w").file
    fd = os.open(file, os.O_RDONLY)
    os.fsync(fd)

    def cached() -> int:
        size = file.stat().st_size
        with open(file, "rb") as f, mmap.mmap(f.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
            pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            hook = (ctypes.c_char * size).from_buffer(m)
            status = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(hook)), ctypes.c_size_t(size), pages)
            del hook
            return -1 if status else sum(p & 1 for p in pages)

    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if cached() != 0:
        pytest.skip("this file system does not drop its pages")
    c.read("w")
    assert cached() < 64  # of 4096 pages


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=0, max_size=3), st.sampled_from([np.float32, np.float16, np.int8, np.uint16, np.bool_])
)
def test_any_shape_and_dtype(tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: type) -> None:
    array = RNG.integers(0, 2, shape).astype(dtype)
    c = Checkpoint.open(folder(tmp_path_factory.mktemp("m"), w=array, a=A))
    np.testing.assert_array_equal(c.read("w"), array)
    np.testing.assert_array_equal(c.read("a"), A)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    first = Checkpoint.open(folder(tmp_path / "m")).fingerprint
    assert Checkpoint.open(folder(tmp_path / "copy")).fingerprint == first
    (tmp_path / "m" / "config.json").write_text('{"model_type": "olmoe"}')
    assert Checkpoint.open(tmp_path / "m").fingerprint != first
    assert Checkpoint.open(folder(tmp_path / "other", a=A.T.copy(), b=B)).fingerprint != first
    assert Checkpoint.open(sharded(tmp_path / "s")).fingerprint != first


def test_changes_after_opening_are_noticed(tmp_path: Path) -> None:
    c = Checkpoint.open(folder(tmp_path / "m"))
    file = c.ref("a").file
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed since"):
        c.unchanged()
    with pytest.raises(CheckpointError, match="changed since"):
        c.read("a")
    c = Checkpoint.open(tmp_path / "m")
    folder(tmp_path / "m", a=A, b=B, extra=A)
    with pytest.raises(CheckpointError, match="changed since"):
        c.unchanged()
    c = Checkpoint.open(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        c.unchanged()


def test_a_file_cut_while_in_use_is_noticed(tmp_path: Path) -> None:
    c = Checkpoint.open(folder(tmp_path / "m"))
    del c.stamps[c.ref("a").file]  # as if it shrank between the check and the read
    os.truncate(c.ref("a").file, c.ref("b").offset + 4)
    with pytest.raises(CheckpointError, match="ends after"):
        c.read("a" if c.ref("a").offset > c.ref("b").offset else "b")


def test_unknown_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor nope"):
        Checkpoint.open(folder(tmp_path / "m")).read("nope")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[]"), "JSON list"),
    "config is not text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
    "config is nested without end": (lambda p: (p / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "no weights": (lambda p: (p / INDEX).unlink() or [f.unlink() for f in p.glob("*.safetensors")], "no model.safetensors"),
    "no index": (lambda p: (p / INDEX).unlink(), "only model-00001-of-00002.safetensors"),
    "missing shard": (lambda p: (p / "model-00002-of-00002.safetensors").unlink(), "lacks 1 of the 2 shards"),
    "index is not JSON": (lambda p: (p / INDEX).write_text("nope"), "not valid JSON"),
    "index without a map": (lambda p: (p / INDEX).write_text("{}"), "no usable weight_map"),
    "index with an empty map": (lambda p: (p / INDEX).write_text('{"weight_map": {}}'), "no usable weight_map"),
    "index with numbers": (lambda p: (p / INDEX).write_text('{"weight_map": {"a": 1}}'), "no usable weight_map"),
    "index leaves the folder": (lambda p: (p / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'), "outside"),
    "index with an absolute path": (lambda p: (p / INDEX).write_text('{"weight_map": {"a": "/etc/passwd"}}'), "outside"),
    "index with a Windows path": (lambda p: (p / INDEX).write_text(r'{"weight_map": {"a": "..\\x"}}'), "outside"),
    "tensor not in its shard": (
        lambda p: save_file({"c": B}, p / "model-00002-of-00002.safetensors"),
        "b is in model-00002-of-00002.safetensors, but it is not there",
    ),
    "tensor in two shards": (
        lambda p: save_file({"a": A, "b": B}, p / "model-00002-of-00002.safetensors"),
        "a is in two files",
    ),
    "cut short": (lambda p: os.truncate(p / "model-00001-of-00002.safetensors", 100), "cut short"),
    "cut within the header": (lambda p: os.truncate(p / "model-00001-of-00002.safetensors", 20), "header would be"),
    "empty file": (lambda p: os.truncate(p / "model-00001-of-00002.safetensors", 0), "header would be"),
    "a folder for a file": (
        lambda p: (p / "model-00001-of-00002.safetensors").unlink() or (p / "model-00001-of-00002.safetensors").mkdir(),
        "not a regular file",
    ),
    "a pipe for a file": (
        lambda p: (p / "model-00001-of-00002.safetensors").unlink() or os.mkfifo(p / "model-00001-of-00002.safetensors"),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(tmp_path: Path, name: str) -> None:
    damage, says = DAMAGE[name]
    damage(sharded(tmp_path))
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.expected or caught.value.fix


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{{{{", b"", "header is not valid"),
    "not UTF-8": (b'{"\xff":1}', b"", "header is not valid"),
    "a list": ([], b"", "not a JSON object"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, b"", "holds no tensors"),
    "entry is a number": ({"a": 3}, b"", "lacks dtype"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, b"", "lacks dtype"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"", "lacks dtype"),
    "unknown dtype": ({"a": entry("F13", [1], 0, 4)}, bytes(4), "the dtype 'F13'"),
    "too few bytes": ({"a": entry("F32", [2], 0, 4)}, bytes(4), "8 bytes, but owns 4"),
    "too many bytes": ({"a": entry("F16", [2], 0, 8)}, bytes(8), "4 bytes, but owns 8"),
    "negative offset": ({"a": entry("F32", [1], -4, 0)}, bytes(4), "offsets"),
    "negative shape": ({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4), "shape"),
    "offsets in reverse": ({"a": entry("F32", [1], 4, 0)}, bytes(4), "offsets"),
    "offset as text": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, bytes(4), "offsets"),
    "offset as a float": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}, bytes(4), "offsets"),
    "shape of booleans": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4), "shape"),
    "beyond the end": ({"a": entry("F32", [2], 4, 12)}, bytes(8), "cut short"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12), "overlaps"),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, bytes(1), "but owns"),
    "the same name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
        "a appears twice",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lying_headers_are_refused(tmp_path: Path, name: str) -> None:
    header, data, says = LIES[name]
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(raw(tmp_path, header, data))


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 63) + 5, (1 << 64) - 1])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match="header would be"):
        Checkpoint.open(raw(tmp_path, {"a": entry("U8", [1], 0, 1)}, bytes(1), length))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 400), st.integers(0, 255), st.integers(0, 300))
def test_a_flipped_byte_or_a_cut_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int
) -> None:
    path = folder(tmp_path_factory.mktemp("m")) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut] if cut < 100 else data)
    try:
        refs = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(ref.offset > 8 and ref.offset + ref.nbytes <= size for ref in refs)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"only as {name}.*can run code"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c", Path("nowhere")])
def test_missing_folder(model: str | Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        Checkpoint.open(model)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file"):
        Checkpoint.open(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.uint16])
def test_check_finite(bad: float, dtype: type) -> None:
    array = np.zeros((3, 700_001), np.float32)
    array[2, 5] = bad
    stored = (array.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else array.astype(dtype)
    with pytest.raises(CheckpointError, match=r"1 of the 2100003 weights of model\.norm.*first at \[2, 5\]"):
        check_finite(stored, "model.norm")
    stored[2, 5] = 0
    check_finite(stored, "model.norm")
    check_finite(np.full(4, -1, np.int64), "ids")


def test_opens_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from moestro.models.checkpoint import Checkpoint; from moestro.models.layout import Part;"
        f"Checkpoint.open({str(folder(tmp_path / 'm'))!r}).read('a');"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
