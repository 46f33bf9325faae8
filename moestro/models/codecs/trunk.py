"""A trunk's matrices in few-bit tiles: made from the checkpoint a few rows at a time, and kept whole in one file that is read at once.

What is quantised is a set of names; every other tensor of the trunk stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moestro.core.errors import CheckpointError, InputError
from moestro.kernels.checksum import crc32
from moestro.kernels.packed import TILE, Packed, part_sizes, quantise
from moestro.kernels.reader import READERS, Read, Reader, aligned
from moestro.models.checkpoint import NUMPY, Checkpoint, check_finite
from moestro.models.codecs.coded import is_coded
from moestro.models.codecs.encode import Codec, check_fit, parse_codec

FILE = "trunk.bin"
_LINE, _PAGE = 64, 4096
_WEIGHTS_AT_ONCE = 1 << 21  # as float32 while they are encoded: 8 MiB
_READ = 8 << 20


class Entry(NamedTuple):
    """One array of a trunk file. dtype: a numpy name, or '' for the tiles of rows x cols. crc: of its bytes."""

    name: str
    piece: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    crc: int


def encode_rows(checkpoint: Checkpoint, name: str, codec: Codec, first: int = 0, count: int | None = None) -> Packed:
    """Rows first:first+count of a matrix on disk (all of them by default) in tiles. Raises CheckpointError, InputError."""
    ref = checkpoint.ref(name)
    rows, cols = ref.shape[0] if count is None else count, ref.shape[1]
    check_fit(codec, cols, f"{name} has rows")
    if is_coded(ref.dtype):
        raise InputError(
            f"{name} is coded in {ref.dtype} already", expected="a trunk of plain numbers", fix="use the trunk codec 'stored'"
        )
    dtype = np.dtype(NUMPY[ref.dtype])
    parts = tuple(aligned(size) for size in part_sizes(rows, cols, codec.format, codec.group))
    tile = part_sizes(TILE, cols, codec.format, codec.group)
    step = max(TILE, _WEIGHTS_AT_ONCE // cols // TILE * TILE)
    for at in range(0, rows, step):
        some = min(step, rows - at)
        raw = np.empty(some * cols * dtype.itemsize, np.uint8)
        checkpoint.read_range(ref.file, ref.offset + (first + at) * cols * dtype.itemsize, raw)
        stored = raw.view(dtype).reshape(some, cols)
        check_finite(stored, name)
        try:
            made = quantise(stored, codec.format, codec.group)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be stored as {codec.name}: {error}", fix="keep the trunk as stored") from error
        for whole, piece, size in zip(parts, made.parts, tile, strict=True):
            whole[at // TILE * size :][: piece.nbytes] = piece
    return Packed(parts, codec.format, codec.group, rows, cols)


def encoded_bytes(name: str, shape: tuple[int, ...], pieces: int, codec: Codec) -> int:
    """Bytes of a matrix in tiles, cut into `pieces` of equal rows. Raises InputError when the codec does not fit."""
    check_fit(codec, shape[1], f"{name} has rows")
    return pieces * sum(part_sizes(shape[0] // pieces, shape[1], codec.format, codec.group))


def same_bytes(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors on disk are of one dtype and shape and hold the same bytes. Raises CheckpointError."""
    one, two = checkpoint.ref(a), checkpoint.ref(b)
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    for at in range(0, one.nbytes, _READ):
        first, second = (np.empty(min(_READ, one.nbytes - at), np.uint8) for _ in range(2))
        checkpoint.read_range(one.file, one.offset + at, first)
        checkpoint.read_range(two.file, two.offset + at, second)
        if not np.array_equal(first, second):
            return False
    return True


def write_trunk(
    checkpoint: Checkpoint, names: Iterable[str], matrices: Mapping[str, int], codec: Codec, file: BinaryIO
) -> dict[str, Any]:
    """Write a trunk to `file`; what it returns is the description that `PackedTrunk` reads it by.

    Args:
        names: every tensor to write. matrices: those to quantise, and into how many pieces of equal rows each is cut.

    Raises: CheckpointError, InputError; OSError from the file.
    """
    entries: list[Entry] = []
    at = 0

    def put(name: str, piece: int, dtype: str, shape: tuple[int, ...], arrays: Iterable[np.ndarray]) -> None:
        nonlocal at
        start, crc = at, 0
        for array in arrays:
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for some in (data, np.zeros(-data.nbytes % _LINE, np.uint8)):
                crc = crc32(some, crc)
                at += file.write(some.data)
        entries.append(Entry(name, piece, dtype, shape, start, at - start, crc))

    for name in names:
        if name in matrices:
            rows = checkpoint.ref(name).shape[0] // matrices[name]
            for piece in range(matrices[name]):
                packed = encode_rows(checkpoint, name, codec, piece * rows, rows)
                put(name, piece, "", packed.shape, packed.parts)
        else:
            array = checkpoint.read(name)
            check_finite(array, name)
            put(name, 0, array.dtype.name, array.shape, [array])
    at += file.write(bytes(-at % _PAGE))
    return {"codec": codec.name, "file": FILE, "size": at, "entries": [list(e) for e in entries]}


class PackedTrunk:
    """The trunk of a packed folder, in memory of its own.

    said: what `write_trunk` returned. nbytes: of the memory. Raises CheckpointError when the file is not as it was written.
    """

    def __init__(self, folder: Path, said: Mapping[str, Any]) -> None:
        self.file = folder / str(said["file"])
        self.codec = parse_codec(str(said["codec"]))
        self._entries: dict[tuple[str, int], Entry] = {}
        for name, piece, dtype, shape, offset, nbytes, crc in said["entries"]:
            self._entries[name, piece] = Entry(name, piece, dtype, tuple(shape), offset, nbytes, crc)
        self._buffer = self._read(int(said["size"]))
        self._sound: set[int] = set()

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def holds(self, name: str) -> bool:
        return (name, 0) in self._entries

    def check(self) -> None:
        """Raises CheckpointError when any part is damaged."""
        for name, piece in self._entries:
            self._entry(name, piece)

    def array(self, name: str) -> np.ndarray:
        """A tensor kept as stored (BF16 as uint16)."""
        entry = self._entry(name, 0)
        nbytes = int(np.prod(entry.shape)) * np.dtype(entry.dtype).itemsize
        return self._buffer[entry.offset :][:nbytes].view(entry.dtype).reshape(entry.shape)

    def tiles(self, name: str, piece: int = 0) -> Packed:
        """A quantised matrix, or one of the pieces it is cut into."""
        entry = self._entry(name, piece)
        rows, cols = entry.shape
        parts, at = [], entry.offset
        for size in part_sizes(rows, cols, self.codec.format, self.codec.group):
            parts.append(self._buffer[at : at + size])
            at += size + -size % _LINE
        return Packed(tuple(parts), self.codec.format, self.codec.group, rows, cols)

    def _entry(self, name: str, piece: int) -> Entry:
        entry = self._entries.get((name, piece))
        if entry is None:
            raise self._damaged(f"{name} is not in {self.file}")
        if entry.offset not in self._sound:
            held = self._buffer[entry.offset : entry.offset + entry.nbytes]
            if held.nbytes != entry.nbytes or crc32(held) != entry.crc:
                raise self._damaged(f"{name} in {self.file} is damaged")
            self._sound.add(entry.offset)
        return entry

    def _read(self, size: int) -> np.ndarray:
        buffer = aligned(size)
        try:
            with Reader(READERS) as reader:
                index = reader.add(self.file)
                if reader.size(index) != size:
                    raise self._damaged(f"{self.file} has {reader.size(index)} bytes, {size} were written")
                pieces = range(0, size, _READ)
                tickets = [reader.submit([Read(index, at, min(_READ, size - at), buffer[at : at + _READ])]) for at in pieces]
                for ticket in tickets:
                    reader.wait(ticket)
        except (OSError, EOFError) as error:
            raise self._damaged(f"the packed trunk {self.file} cannot be read: {error}") from error
        return buffer

    @staticmethod
    def _damaged(found: str) -> CheckpointError:
        return CheckpointError(found, expected="the bytes that were packed", fix="pack the model again with `moestro apply`")
