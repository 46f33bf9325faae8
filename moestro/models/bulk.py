"""Large byte ranges of a checkpoint, read past the page cache into buffers that are used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.kernels.reader import BLOCK, READERS, Read, Reader, aligned
from moestro.models.checkpoint import Checkpoint

_KEPT = 64 << 20  # bytes from which a buffer is given back to the system


class Span(Protocol):
    """Where bytes lie: a `Part` of an expert, or a `TensorRef`."""

    @property
    def file(self) -> Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class BulkReader:
    """Reads for several threads at once. A context manager; the files stay open in it, so whoever uses it asks
    `Checkpoint.unchanged` at the end."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._reader, self._lock = checkpoint, Reader(READERS), threading.Lock()
        self._files: dict[Path, int] = {}
        self._free: list[np.ndarray] = []

    @contextmanager
    def lend(self, spans: Sequence[Span]) -> Iterator[list[np.ndarray]]:
        """The bytes of each span, uint8 at any alignment, until the block ends. Raises CheckpointError."""
        # Whole blocks around what is asked for: only those bypass the page cache.
        starts = [span.offset // BLOCK * BLOCK for span in spans]
        sizes = [-(-(span.offset + span.nbytes) // BLOCK) * BLOCK - start for span, start in zip(spans, starts, strict=True)]
        room, reads, out, at = self._take(sum(sizes)), [], [], 0
        try:
            for span, start, size in zip(spans, starts, sizes, strict=True):
                file = self._file(span.file)
                reads.append(Read(file, start, size, room[at : at + size]))
                out.append(room[at + span.offset - start :][: span.nbytes])
                at += size
            self._reader.wait(self._reader.submit(reads))
        except (OSError, EOFError) as error:
            raise CheckpointError(f"reading {spans[0].file} failed: {error}", fix="check the disk and the file") from error
        yield out
        if room.nbytes < _KEPT:
            with self._lock:
                self._free.append(room)

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._reader.add(path)
            return self._files[path]

    def _take(self, nbytes: int) -> np.ndarray:
        with self._lock:
            fitting = [i for i, room in enumerate(self._free) if room.nbytes >= nbytes]
            if fitting:
                return self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes))
        return aligned(nbytes)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> BulkReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
