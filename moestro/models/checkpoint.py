"""A Hugging Face checkpoint on disk: names, shapes and byte ranges of its tensors. Opening it reads headers only.

Source: the safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moestro.core.errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
NUMPY: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64,
    "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8,
    "F8_E4M3FNUZ": np.uint8, "F8_E5M2FNUZ": np.uint8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit
_PIECE = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor: `nbytes` at byte `offset` of `file`. dtype: the safetensors name ('F32', 'BF16', 'U8', ...), or of a matrix in few-bit
    tiles its codec ('int4:64', see models.codecs.coded)."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Stamp(NamedTuple):
    """What a file was when it was opened."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. source: as the user named it. path: its folder. tensors: by name, sorted.

    fingerprint: digest of the configuration and of every tensor's name, dtype, shape and place, and of the file sizes.
    stamps: size, modification time and inode of each file when it was opened.
    """

    source: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    fingerprint: str
    stamps: dict[Path, Stamp]

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a local folder, a Hub id `org/name` or `org/name@revision`. Raises CheckpointError."""
        from moestro.models.hub import locate

        path = locate(model)
        config = read_json(path / CONFIG)
        stamps = {path / CONFIG: _stamp(path / CONFIG)}
        listed: dict[str, str] = {}
        if (path / WEIGHTS).exists() or (path / WEIGHTS).is_symlink():
            files = [path / WEIGHTS]
        elif (path / INDEX).exists():
            listed = _read_index(path / INDEX)
            stamps[path / INDEX] = _stamp(path / INDEX)
            files = [path / name for name in sorted(set(listed.values()))]
            if missing := [f.name for f in files if not f.exists()]:
                raise CheckpointError(
                    f"{path} lacks {len(missing)} of the {len(files)} shards in its index: {_few(missing)}",
                    fix="download the missing files, or copy the whole folder again",
                )
        else:
            raise _no_weights(path)
        tensors: dict[str, TensorRef] = {}
        for file in files:
            stamps[file] = _stamp(file)
            for ref in read_header(file):
                if (other := tensors.get(ref.name)) is not None:
                    raise CheckpointError(
                        f"the tensor {ref.name} is in two files: {other.file.name} and {file.name}",
                        expected="each tensor once",
                        fix="remove the file that does not belong to this checkpoint, or download it again",
                    )
                tensors[ref.name] = ref
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors", expected="a model's weights", fix="download the checkpoint again")
        for name, shard in listed.items():
            if name not in tensors or tensors[name].file != path / shard:
                raise CheckpointError(
                    f"the index says that {name} is in {shard}, but it is not there",
                    expected="an index and shards of the same checkpoint",
                    fix="download the index and the shards again from one revision",
                )
        from moestro.models.codecs.coded import mark

        tensors = mark(config, dict(sorted(tensors.items())))
        return cls(str(model), path, config, tensors, _fingerprint(path, config, tensors, stamps), stamps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted({ref.file for ref in self.tensors.values()}))

    def ref(self, name: str) -> TensorRef:
        """The tensor's place. Raises CheckpointError when there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name}", expected=f"{len(self.tensors)} tensors such as {_few(list(self.tensors))}"
            ) from None

    def read(self, name: str) -> np.ndarray:
        """The tensor as an array of its shape; BF16 comes as uint16 bit patterns, 8-bit floats as uint8. Raises CheckpointError."""
        ref = self.ref(name)
        if ref.dtype not in NUMPY:
            raise CheckpointError(f"{name} has dtype {ref.dtype}, which cannot be read as an array", expected=", ".join(NUMPY))
        out = np.empty(ref.shape, NUMPY[ref.dtype])
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Read the tensor's bytes into `out`, a contiguous array of exactly that many bytes. Raises CheckpointError."""
        ref = self.ref(name)
        assert out.flags.c_contiguous and out.nbytes == ref.nbytes, f"{name} needs {ref.nbytes} contiguous bytes"
        if ref.nbytes:
            self.read_range(ref.file, ref.offset, out.reshape(-1).view(np.uint8))

    def read_range(self, file: Path, offset: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, one dimension) from byte `offset` of one of the files; the page cache is left as small as before.

        Raises CheckpointError when the file cannot be read, is too short or has changed since it was opened.
        """
        try:
            fd = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}", fix="check the file and its permissions") from error
        try:
            if file in self.stamps:
                _same(file, os.fstat(fd), self.stamps[file])
            view, done = out.data, 0
            while done < len(view):
                got = os.preadv(fd, [view[done : done + _PIECE]], offset + done)
                if got == 0:
                    raise CheckpointError(
                        f"{file} ends after {offset + done} bytes, {offset + len(view)} are needed",
                        expected="a complete file",
                        fix="download or copy the file again",
                    )
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, offset + done, got, os.POSIX_FADV_DONTNEED)
                done += got
        except OSError as error:
            raise CheckpointError(f"reading {file} failed: {error.strerror}", fix="check the disk and the file") from error
        finally:
            os.close(fd)

    def unchanged(self) -> None:
        """Raises CheckpointError when a file was changed, replaced or removed since the checkpoint was opened."""
        for file, stamp in self.stamps.items():
            try:
                now = os.stat(file)
            except OSError as error:
                raise CheckpointError(
                    f"{file} is gone since the checkpoint was opened: {error.strerror}", fix="put it back and start again"
                ) from error
            _same(file, now, stamp)


def check_finite(array: np.ndarray, name: str) -> None:
    """Raises CheckpointError when a weight is NaN or infinite. uint16 arrays are taken as BF16, integers pass."""
    if array.dtype != np.uint16 and array.dtype.kind not in "fc":
        return
    flat, bad, first = array.reshape(-1), 0, -1
    for start in range(0, flat.size, 1 << 20):  # pieces, so that no large temporary is made
        piece = flat[start : start + (1 << 20)]
        wrong = (piece & 0x7F80) == 0x7F80 if array.dtype == np.uint16 else ~np.isfinite(piece)
        if count := int(np.count_nonzero(wrong)):
            first = start + int(np.argmax(wrong)) if first < 0 else first
            bad += count
    if bad:
        at = tuple(int(i) for i in np.unravel_index(first, array.shape))
        raise CheckpointError(
            f"{bad} of the {flat.size} weights of {name} are NaN or infinite, the first at {list(at)}",
            expected="finite weights",
            fix="the file is damaged or the model was trained to divergence: download it again or use another checkpoint",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, unreadable or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}", expected="a Hugging Face model folder", fix="give the folder that holds it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", fix="check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", fix="download or copy the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}", expected="a JSON object")
    return data


def read_header(file: Path) -> list[TensorRef]:
    """The tensors of one safetensors file, in the order of their offsets; every size is checked. Raises CheckpointError."""
    try:
        info = os.stat(file)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{file} is not a regular file", expected="a safetensors file")
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if info.st_size < 8 or not 2 <= length <= min(info.st_size - 8, _MAX_HEADER):
                raise _broken(file, f"its header would be {length} bytes of a file of {info.st_size}")
            header = json.loads(f.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", fix="check the file and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    base, refs = 8 + length, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, start, stop]
        except (TypeError, KeyError, ValueError) as error:
            raise _broken(file, f"its entry for {name} lacks dtype, shape or data_offsets") from error
        if not all(type(n) is int and n >= 0 for n in numbers) or stop < start:
            raise _broken(file, f"{name} has shape {list(shape)} and offsets {[start, stop]}")
        if dtype not in BITS:
            raise CheckpointError(f"{name} in {file} has the dtype {dtype!r}", expected=", ".join(BITS))
        bits = math.prod(shape) * BITS[dtype]
        if bits % 8 or stop - start != bits // 8:
            raise _broken(file, f"{name} says {dtype} {list(shape)}, which is {bits // 8} bytes, but owns {stop - start}")
        if base + stop > info.st_size:
            raise CheckpointError(
                f"{file} is cut short: {name} ends at byte {base + stop}, the file has {info.st_size}",
                expected="a complete file",
                fix="download or copy it again",
            )
        refs.append(TensorRef(name, file, base + start, stop - start, dtype, shape))
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    at = base
    for ref in refs:
        if ref.offset < at:
            raise _broken(file, f"{ref.name} overlaps the tensor before it")
        at = ref.offset + ref.nbytes
    return refs


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} appears twice")
    return out


def _read_index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(v, str) for v in listed.values()):
        raise CheckpointError(f"{path} has no usable weight_map", expected="tensor names mapped to file names")
    for name in sorted(set(listed.values())):
        if not name or "\\" in name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(
                f"{path} names a file outside the checkpoint's folder: {name!r}",
                expected="file names inside the folder",
                fix="do not trust this checkpoint",
            )
    return listed


def _fingerprint(path: Path, config: dict[str, Any], tensors: dict[str, TensorRef], stamps: dict[Path, Stamp]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for ref in tensors.values():
        row = [ref.name, ref.dtype, ref.shape, ref.file.relative_to(path).as_posix(), ref.offset]
        digest.update(json.dumps(row).encode())
    for file in sorted({ref.file for ref in tensors.values()}):
        digest.update(json.dumps([file.relative_to(path).as_posix(), stamps[file].size]).encode())
    return digest.hexdigest()


def _stamp(file: Path) -> Stamp:
    try:
        info = os.stat(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}", fix="check the file and its permissions") from error
    return Stamp(info.st_size, info.st_mtime_ns, info.st_ino)


def _same(file: Path, now: os.stat_result, then: Stamp) -> None:
    if (now.st_size, now.st_mtime_ns, now.st_ino) != then:
        raise CheckpointError(
            f"{file} has changed since the checkpoint was opened ({then.size} bytes then, {now.st_size} now)",
            expected="files that stay as they are while they are in use",
            fix="start again; plans made before the change must be made again",
        )


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted({p.name for pattern in PICKLES for p in path.glob(pattern)})
    if pickles:
        return CheckpointError(
            f"{path} holds weights only as {_few(pickles)}, a format that can run code when it is loaded",
            expected=f"{WEIGHTS}, or {INDEX} with its shards",
            fix="use a revision with safetensors, or convert it with transformers: save_pretrained writes them",
        )
    others = sorted(p.name for p in path.glob("*.safetensors"))
    return CheckpointError(
        f"{path} has no {WEIGHTS} and no {INDEX}" + (f", only {_few(others)}" if others else ""),
        expected="a model's weights as safetensors",
        fix=f"copy {INDEX} beside the shards" if others else "download the weights, or give the folder that holds them",
    )


def _broken(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not a sound safetensors file: {what}", expected="a complete file", fix="download or copy it again"
    )


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
