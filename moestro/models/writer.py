"""Writing a checkpoint: streaming, sharded, and never visible half-written.

Everything goes to `FOLDER.partial`, which becomes FOLDER by one rename when it is complete. A journal lists the shards that are
complete, so that an interrupted write with the same `resume_key` goes on after them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from moestro.core.errors import CheckpointError, InputError, StorageError
from moestro.models.checkpoint import BITS, CONFIG, INDEX, NUMPY, WEIGHTS, Checkpoint, read_header
from moestro.models.codecs.coded import is_coded

COMPANIONS = (
    "tokenizer*", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "generation_config.json", "preprocessor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_JOURNAL, _LOCK = "journal.json", "lock"
# The header comes first in the file but is known last: its space is kept free, and the data starts on a 4096-byte boundary.
_HEADER = 128 << 10
_PIECE = 8 << 20
_NAMES = {np.dtype(kind): name for name, kind in NUMPY.items() if kind not in (np.uint16, np.uint8)} | {np.dtype(np.uint8): "U8"}


class CheckpointWriter:
    """Writes tensors one by one into a new model folder; holds no tensor longer than its call. A context manager.

    Args:
        folder: the new model's folder; must not exist yet, or be empty, unless `overwrite`.
        config: what config.json will hold.
        shard_bytes: a shard is closed before its data grows beyond this (a larger tensor gets a shard of its own).
        resume_key: says what is being written (a digest of the inputs). A `.partial` folder with the same key is continued,
            any other is replaced. Empty: never continued, and nothing stays behind after an error.

    Raises StorageError when the target cannot be written, is in the way or is being written by another process.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        resume_key: str = "",
    ) -> None:
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.config: dict[str, Any] = json.loads(json.dumps(dict(config)))  # as it will be read back
        self.overwrite, self.resume_key = overwrite, resume_key
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self._tensors: dict[str, int] = {}  # name -> number of its shard
        self._sizes: list[int] = []  # bytes of data of each complete shard
        self._entries: dict[str, dict[str, Any]] = {}  # of the open shard
        self._at = self._header = 0
        self._fd = self._lock = -1
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None  # of the last complete shard
        with self._guard():
            if not overwrite and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise StorageError(f"{self.folder} exists already", fix="choose another output folder, or remove it first")
            self.partial.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abort()  # nothing left to do after finish()

    def __contains__(self, name: str) -> bool:
        """Whether the tensor is written already, in this run or in the one being resumed: then adding it does nothing."""
        return name in self._tensors or name in self._entries

    def add(self, name: str, array: np.ndarray, dtype: str | None = None) -> None:
        """Write an array. dtype: the safetensors name; needed for uint16 ('BF16' or 'U16') and 8-bit floats."""
        dtype = dtype or _NAMES[array.dtype]
        assert array.dtype.itemsize * 8 == BITS[dtype], f"{name}: an array of {array.dtype} cannot be stored as {dtype}"
        self.stream(name, dtype, array.shape, _pieces(array))

    def copy(self, name: str, source: Checkpoint, source_name: str | None = None) -> None:
        """Copy a tensor's bytes from another checkpoint, in pieces."""
        ref = source.ref(source_name or name)

        def pieces() -> Iterator[np.ndarray]:
            buffer = np.empty(min(_PIECE, ref.nbytes), np.uint8)
            for start in range(0, ref.nbytes, _PIECE):
                piece = buffer[: min(_PIECE, ref.nbytes - start)]
                source.read_range(ref.file, ref.offset + start, piece)
                yield piece

        coded = is_coded(ref.dtype)  # a matrix in tiles is plain bytes in the file
        self.stream(name, "U8" if coded else ref.dtype, (ref.nbytes,) if coded else ref.shape, pieces())

    def stream(self, name: str, dtype: str, shape: Iterable[int], pieces: Iterable[np.ndarray]) -> None:
        """Write a tensor from contiguous arrays whose bytes, joined, are its data. A wrong total is a programmer's error."""
        shape = tuple(int(n) for n in shape)
        nbytes = math.prod(shape) * BITS[dtype] // 8
        if name in self._tensors:
            return
        assert name not in self._entries, f"{name} is written twice"
        with self._guard():
            entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, nbytes]}
            room = len(json.dumps({name: entry})) + 40  # 40: the offsets' digits
            if self._entries and (self._at + nbytes > self.shard_bytes or self._header + room > _HEADER - 64):
                self._close_shard()
            if self._fd < 0:
                self._open_shard()
            start = self._at
            for piece in pieces:
                self._write(piece.reshape(-1).view(np.uint8).data if piece.size else memoryview(b""))
            assert self._at - start == nbytes, f"{name} needs {nbytes} bytes, {self._at - start} came"
            self._entries[name] = {**entry, "data_offsets": [start, self._at]}
            self._header += room

    def finish(self, copy_files_from: Checkpoint | str | Path | None = None) -> Checkpoint:
        """Complete the folder (with tokenizer, chat template, generation and licence files from another) and open it."""
        with self._guard():
            if self._fd >= 0:
                self._close_shard()
            self._sealed()
            assert self._sizes, "a checkpoint without tensors"
            if copy_files_from is not None:
                source = copy_files_from.path if isinstance(copy_files_from, Checkpoint) else Path(copy_files_from)
                copy_companions(source, self.partial)
            names = [WEIGHTS]
            if len(self._sizes) > 1:
                names = [f"model-{i + 1:05}-of-{len(self._sizes):05}.safetensors" for i in range(len(self._sizes))]
            _write_json(self.partial / CONFIG, self.config)
            if len(names) > 1:
                listed = {name: names[shard] for name, shard in sorted(self._tensors.items())}
                _write_json(self.partial / INDEX, {"metadata": {"total_size": sum(self._sizes)}, "weight_map": listed})
            # From here on the journal's names do not hold, so a crash means starting anew; nothing below needs space.
            (self.partial / _JOURNAL).unlink(missing_ok=True)
            for i, name in enumerate(names):
                os.replace(self._shard(i), self.partial / name)
            (self.partial / _LOCK).unlink()
            _sync(self.partial)
            self._swap()
        self._release()
        return Checkpoint.open(self.folder)

    def abort(self) -> None:
        """Stop without a result. Complete shards stay in the `.partial` folder if there is a `resume_key`, else nothing stays."""
        if self._lock < 0:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._shard(len(self._sizes)).unlink(missing_ok=True)
        with suppress(OSError):  # whatever it was, the journal says what is complete
            self._sealed()
        if not (self.resume_key and self._sizes and (self.partial / _JOURNAL).exists()):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._release()

    def _shard(self, i: int) -> Path:
        return self.partial / f"shard-{i + 1:05}.safetensors"

    def _open_shard(self) -> None:
        self._fd = os.open(self._shard(len(self._sizes)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._entries, self._at, self._header = {}, 0, 40

    def _write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + _PIECE], _HEADER + self._at + done)
        self._at += done

    def _close_shard(self) -> None:
        room = _HEADER - 8
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
        if len(text) > room:  # only a single tensor with an absurd name
            raise InputError(f"a tensor's name of {len(text)} bytes cannot be stored", expected=f"fewer than {room} bytes")
        head = room.to_bytes(8, "little") + text.ljust(room)
        assert os.pwrite(self._fd, head, 0) == len(head)
        self._sealed()  # one at a time, so that what waits for the disk stays below two shards
        self._tensors |= dict.fromkeys(self._entries, len(self._sizes))
        self._sizes.append(self._at)
        fd, self._fd, self._entries = self._fd, -1, {}
        journal = {"key": self.resume_key, "config": self.config, "sizes": list(self._sizes)}
        self._sealing = self._sealer.submit(_seal, fd, self.partial / _JOURNAL, journal)

    def _sealed(self) -> None:
        """Wait until every complete shard is on the disk and in the journal. Raises OSError when one is not."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def _resume(self) -> None:
        try:
            journal = json.loads((self.partial / _JOURNAL).read_text(encoding="utf-8"))
            same = bool(self.resume_key) and journal["key"] == self.resume_key and journal["config"] == self.config
            for i, size in enumerate(journal["sizes"] if same else ()):
                refs = read_header(self._shard(i))
                if sum(ref.nbytes for ref in refs) != size:
                    break
                self._sizes.append(size)
                self._tensors |= {ref.name: i for ref in refs}
        except (FileNotFoundError, ValueError, KeyError, TypeError, CheckpointError):
            pass  # what cannot be read is written again
        kept = {_LOCK, _JOURNAL, *(self._shard(i).name for i in range(len(self._sizes)))} if self._sizes else {_LOCK}
        for path in self.partial.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _take_lock(self) -> None:
        fd = os.open(self.partial / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise StorageError(
                f"another process is writing {self.partial}", fix="wait for it, or choose another output folder"
            ) from error
        self._lock = fd

    def _release(self) -> None:
        self._sealer.shutdown()
        os.close(self._lock)
        self._lock = -1

    def _swap(self) -> None:
        old = self.folder.with_name(self.folder.name + ".replaced")
        if self.overwrite and self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.folder, old)
        os.rename(self.partial, self.folder)  # onto an empty folder too
        shutil.rmtree(old, ignore_errors=True)
        _sync(self.folder.parent)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Clean up after any failure, and turn the file system's errors into StorageError."""
        try:
            yield
        except OSError as error:
            self.abort()
            kept = " What is complete is kept: the same command continues there." if self.partial.exists() else ""
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"{self.folder} cannot be written: {error.strerror or error}.{kept}",
                expected=f"room for the whole checkpoint (at least {self._at + sum(self._sizes)} bytes)" if full else "",
                fix="make room, or choose an output folder on another disk"
                if full
                else "choose an output folder you can write to",
            ) from error
        except BaseException:
            self.abort()
            raise


def check_room(target: str | Path, nbytes: int) -> None:
    """Raises StorageError when the disk of `target` is too full for so many bytes, complete shards of an interrupted run among them."""
    target = Path(target)
    there = next((p for p in (target.absolute(), *target.absolute().parents) if p.exists()), Path("/"))
    already = sum(f.stat().st_size for f in target.with_name(target.name + ".partial").glob("shard-*"))
    if (free := shutil.disk_usage(there).free + already) < nbytes:
        raise StorageError(
            f"{there} has {free / 1e6:.1f} MB free",
            expected=f"about {nbytes / 1e6:.1f} MB",
            fix="make room, or choose another disk",
        )


class Made(NamedTuple):
    """A tensor made when it is its turn to be written, so that only one is held at a time."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes to a checkpoint's tensors. rename: old name to new. remove: names. replace: by old name. add: by new name."""

    rename: Mapping[str, str] = field(default_factory=dict)
    remove: Collection[str] = ()
    replace: Mapping[str, Made] = field(default_factory=dict)
    add: Mapping[str, Made] = field(default_factory=dict)


def edit_checkpoint(
    source: Checkpoint,
    out: str | Path,
    edits: Edits,
    *,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    resume_key: str = "",
) -> Checkpoint:
    """Write `source` with edits to the folder `out`, tensor by tensor, and open the result.

    Raises InputError for edits of tensors that do not exist or that collide, StorageError when `out` cannot be written,
    CheckpointError when `source` cannot be read.
    """
    named = [*edits.rename, *edits.remove, *edits.replace]
    if unknown := sorted(set(named) - set(source.tensors)):
        raise InputError(
            f"there is no tensor {unknown[0]} to edit", expected=f"one of the {len(source.tensors)} in {source.path}"
        )
    if both := sorted((set(edits.rename) | set(edits.replace)) & set(edits.remove)):
        raise InputError(f"{both[0]} is both removed and changed")
    target = {name: edits.rename.get(name, name) for name in source.tensors if name not in set(edits.remove)}
    final = [*target.values(), *edits.add]
    if len(set(final)) != len(final):
        twice = next(name for name in final if final.count(name) > 1)
        raise InputError(f"the edits give two tensors the name {twice}")
    if Path(out).resolve() == source.path.resolve():
        raise InputError(f"{out} is the checkpoint being read", fix="choose another output folder")
    key = f"{source.fingerprint} {resume_key}" if resume_key else ""
    with CheckpointWriter(
        out, source.config if config is None else config, shard_bytes=shard_bytes, overwrite=overwrite, resume_key=key
    ) as writer:
        # In the order on disk, so that reading is sequential.
        for name in sorted(target, key=lambda n: (source.tensors[n].file, source.tensors[n].offset)):
            if target[name] in writer:
                continue
            if (made := edits.replace.get(name)) is not None:
                _add_made(writer, target[name], made)
            else:
                writer.copy(target[name], source, name)
        for name, made in edits.add.items():
            if name not in writer:
                _add_made(writer, name, made)
        source.unchanged()
        return writer.finish(copy_files_from=source)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what a model folder holds besides weights and config.json: tokenizer, chat templates, generation defaults, licence."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                to = target / file.relative_to(source)
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, to)


def _add_made(writer: CheckpointWriter, name: str, made: Made) -> None:
    array = made.make()
    assert array.shape == made.shape, f"{name} was announced as {made.shape} and came as {array.shape}"
    writer.add(name, array, made.dtype)


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.flags.c_contiguous:
        yield array
    else:  # a few rows at a time, so that no second copy of the whole exists
        rows = max(1, _PIECE // max(1, array.nbytes // max(1, len(array))))
        for start in range(0, len(array), rows):
            yield np.ascontiguousarray(array[start : start + rows])


def _seal(fd: int, path: Path, journal: dict[str, Any]) -> None:
    """Put a complete shard on the disk and in the journal, in the background: the next one is made meanwhile."""
    try:
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    _write_json(path, journal)


def _write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
