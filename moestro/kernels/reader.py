"""Reads of byte ranges by background threads straight into the caller's buffers, past the page cache where the file system allows it."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from moestro.kernels import native
from moestro.kernels.reader_threads import LATER_PIECE, PIECE, Hurry, Queue

BLOCK = 4096
HUGE = 4 << 20  # bytes from which a buffer asks for huge pages
READERS = 2  # reads in flight that keep one disk busy: deeper queues gain nothing and lengthen the wait for the first


def aligned(nbytes: int) -> np.ndarray:
    """uint8 [nbytes], page-aligned private memory of its own: untouched pages cost nothing, all is given back when it is dropped.

    Large buffers ask for huge pages: weights stream from them 15 % faster, for hardware prefetch stops at the end of a page.
    """
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, nbytes)


class Populated:
    """A large buffer of `aligned` whose pages get their memory in a thread of its own, from the first to the last, until it is closed.

    A read into pages that were never used waits for the system to clear them, a third of its time, while the disk idles. Where the
    system or the buffer's size gives no reason for it nothing is done.
    """

    PIECE, LEAST = 32 << 20, 64 << 20  # bytes between looks at whether to stop; of a buffer that is worth it

    def __init__(self, buffer: np.ndarray) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if native.available() and buffer.nbytes >= self.LEAST:
            self._thread = threading.Thread(target=self._run, args=(buffer,), name="populate", daemon=True)
            self._thread.start()

    def _run(self, buffer: np.ndarray) -> None:
        module, address = native.extension(), buffer.ctypes.data
        for at in range(0, buffer.nbytes, self.PIECE):
            if self._stop.is_set() or not module.populate(address + at, min(self.PIECE, buffer.nbytes - at)):
                return

    def wait(self) -> None:
        """Until all pages are there, or nothing more is done."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Stop. Idempotent."""
        self._stop.set()
        self.wait()


class Read(NamedTuple):
    """`nbytes` at `offset` of file `file` (index from Reader.add) into the first `nbytes` of the contiguous uint8 array `into`."""

    file: int
    offset: int
    nbytes: int
    into: np.ndarray


class Reader:
    """Background reads. Buffers are kept alive until their reads have ended; all methods may be called from any thread.

    Reads whose offset, length and address are multiples of 4096 bypass the page cache (O_DIRECT); others, and all on file
    systems that refuse, are buffered and dropped from the page cache afterwards. A read may reach beyond the end of the file
    up to the next multiple of 4096; the bytes beyond are left as they are.

    threads: reads in flight at once. direct: False never bypasses the page cache.
    """

    def __init__(self, threads: int = 1, direct: bool = True) -> None:
        assert threads >= 1
        module = native.extension()
        self._queue: Any = Queue(threads, direct) if module is None else module.Queue(threads, direct, PIECE, LATER_PIECE)
        self._sizes: list[int] = []
        self._alive: dict[int, list[np.ndarray]] = {}

    def add(self, path: str | Path) -> int:
        """Open a file and give its index. Raises OSError."""
        index, size = self._queue.add(os.fspath(path))
        assert index == len(self._sizes)
        self._sizes.append(size)
        return index

    def size(self, file: int) -> int:
        """Bytes of the file when it was added."""
        return self._sizes[file]

    def submit(self, reads: Sequence[Read], hurry: Hurry = Hurry.NOW) -> int:
        """Queue reads under one new ticket, before all queued ones of less hurry; else first come, first served."""
        pieces, buffers = [], []
        for file, offset, nbytes, into in reads:
            assert into.dtype == np.uint8 and into.ndim == 1 and into.flags.c_contiguous and into.flags.writeable
            assert 0 <= file < len(self._sizes) and offset >= 0 and 0 <= nbytes <= into.nbytes
            pieces.append((file, offset, nbytes, into.ctypes.data))
            buffers.append(into)
        for ticket in self._queue.reap():
            self._alive.pop(ticket, None)
        # Reserve first: the reads may end before submit returns.
        ticket = self._queue.reserve()
        self._alive[ticket] = buffers
        try:
            self._queue.submit(ticket, pieces, hurry)
        except BaseException:
            self._alive.pop(ticket, None)
            raise
        return ticket

    def wait(self, ticket: int) -> None:
        """Block, without the interpreter lock, until every read of the ticket has ended.

        Raises:
            OSError: a read failed. EOFError: the file ends before the range does. ValueError: the reader was closed before.
        """
        try:
            code, message = self._queue.wait(ticket)
        finally:
            self._release(ticket)
        _raise(code, message)

    def done(self, ticket: int) -> bool:
        """Whether `wait` would return or raise at once."""
        return self._queue.done(ticket)

    def promote(self, ticket: int, hurry: Hurry = Hurry.NOW) -> None:
        """Give what is queued with less hurry so much; what has begun or ended stays as it is."""
        self._queue.promote(ticket, hurry)

    def cancel(self, ticket: int) -> None:
        """Do not begin what has not begun. The ticket ends, without an error for that, once what is in flight has; its bytes mean nothing."""
        self._queue.cancel(ticket)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._queue.bytes_read

    @property
    def seconds_busy(self) -> float:
        """Seconds during which at least one read was in flight."""
        return self._queue.seconds_busy

    def close(self) -> None:
        """Drop what is queued, wait for what is in flight, close the files. Waiting tickets raise ValueError. Idempotent."""
        self._queue.close()
        self._alive.clear()

    def _release(self, ticket: int) -> None:
        # An interrupted wait (Ctrl-C) must not free buffers that are still being written.
        if self._queue.done(ticket):
            self._alive.pop(ticket, None)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed; at interpreter exit the rest may be gone.
        with contextlib.suppress(AttributeError, TypeError):
            self.close()


def _raise(code: int, message: str) -> None:
    if code > 0:
        raise OSError(code, f"{os.strerror(code)}: {message}")
    if code == -1:
        raise EOFError(message)
    if code == -2:
        raise ValueError(message)


def probe(path: str | Path, size: int, seconds: float = 0.3, readers: int = READERS) -> float:
    """Bytes per second of direct reads of `size` (rounded up to 4096) at random offsets of the file, `readers` of them in flight.

    Raises:
        OSError: the file cannot be read. ValueError: it is empty.
    """
    with Reader(readers) as reader:
        file = reader.add(path)
        total = reader.size(file)
        if not total:
            raise ValueError(f"{path} is empty, so no reads can be timed")
        size = min(math.ceil(size / BLOCK), math.ceil(total / BLOCK)) * BLOCK
        pool = aligned(max(size * readers, HUGE))  # as in a pool of slots: from small pages a device reads in smaller pieces
        buffers = [pool[i * size : (i + 1) * size] for i in range(readers)]
        for buffer in buffers:
            buffer[::BLOCK] = 0  # page faults are not the disk's time
        places = random.Random(0)

        def ask(buffer: np.ndarray) -> int:
            offset = places.randint(0, (math.ceil(total / BLOCK) * BLOCK - size) // BLOCK) * BLOCK
            return reader.submit([Read(file, offset, size, buffer)])

        spent, began, before = 0.0, time.perf_counter(), reader.bytes_read
        tickets = [ask(buffer) for buffer in buffers]
        turn = 0
        while spent == 0.0 or spent < seconds:
            reader.wait(tickets[turn])
            spent = time.perf_counter() - began
            tickets[turn] = ask(buffers[turn])
            turn = (turn + 1) % readers
        done = reader.bytes_read - before
        for ticket in tickets:
            reader.wait(ticket)
        return done / spent
