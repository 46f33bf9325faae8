"""The reader's queue in Python threads: the reference of the native one, used when there is no extension."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Hurry(IntEnum):
    """What goes first. NOW: somebody waits. SOON: somebody probably will. IDLE: when there is nothing else to read."""

    NOW = 0
    SOON = 1
    IDLE = 2


# Reads are cut to these sizes, those of most hurry and all others, so that nobody waits long for what has less.
PIECE, LATER_PIECE = 4 << 20, 1 << 20
END, CLOSED = -1, -2  # codes of `wait` besides 0 and errno values
_BLOCK = 4096


@dataclass(slots=True)
class _File:
    path: str
    size: int
    direct: int | None
    buffered: int


class _Piece(NamedTuple):
    ticket: int
    file: int
    offset: int
    nbytes: int
    address: int


@dataclass(slots=True)
class _Ticket:
    left: int
    code: int = 0
    message: str = ""


class Queue:
    """A queue for each `Hurry`, and `threads` workers. Addresses must stay valid until their ticket has ended."""

    def __init__(self, threads: int, direct: bool) -> None:
        self._direct = direct
        self._files: list[_File] = []
        self._queues: tuple[deque[_Piece], ...] = tuple(deque() for _ in Hurry)
        self._tickets: dict[int, _Ticket] = {}  # unfinished or failed ones only
        self._ended: list[int] = []
        self._next = 0
        self._closed = False
        self._flying = 0
        self._since = 0.0
        self.bytes_read = 0
        self.seconds_busy = 0.0
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._finished = threading.Condition(self._lock)
        self._threads = [threading.Thread(target=self._run, daemon=True, name="moestro-reader") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def add(self, path: str) -> tuple[int, int]:
        """(index, size). Raises OSError, ValueError once closed."""
        buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        direct = None
        flag = getattr(os, "O_DIRECT", 0)
        if self._direct and flag:
            with contextlib.suppress(OSError):
                direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
        size = os.fstat(buffered).st_size
        with self._lock:
            if self._closed:
                os.close(buffered)
                if direct is not None:
                    os.close(direct)
                raise ValueError("the reader is closed")
            self._files.append(_File(path, size, direct, buffered))
            return len(self._files) - 1, size

    def reserve(self) -> int:
        """A new ticket number."""
        with self._lock:
            self._next += 1
            return self._next

    def submit(self, ticket: int, reads: Sequence[tuple[int, int, int, int]], hurry: int) -> None:
        """Queue (file, offset, nbytes, address) reads."""
        size = PIECE if hurry == Hurry.NOW else LATER_PIECE
        pieces = [
            _Piece(ticket, file, offset + at, min(size, nbytes - at), address + at)
            for file, offset, nbytes, address in reads
            for at in range(0, nbytes, size)
        ]
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            if not pieces:
                self._ended.append(ticket)
                return
            self._tickets[ticket] = _Ticket(len(pieces))
            self._queues[hurry].extend(pieces)
            self._work.notify(len(pieces))

    def reap(self) -> list[int]:
        """Tickets that ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, []
            return ended

    def wait(self, ticket: int) -> tuple[int, str]:
        """(0, '') or the error once all reads of the ticket have ended."""
        with self._lock:
            while (state := self._tickets.get(ticket)) is not None and state.left:
                self._finished.wait()
            return (0, "") if state is None else (state.code, state.message)

    def done(self, ticket: int) -> bool:
        with self._lock:
            state = self._tickets.get(ticket)
            return state is None or state.left == 0

    def promote(self, ticket: int, hurry: int) -> None:
        with self._lock:
            for queue in self._queues[hurry + 1 :]:
                self._queues[hurry].extend(_taken(queue, ticket))

    def cancel(self, ticket: int) -> None:
        with self._lock:
            for queue in self._queues:
                for _ in _taken(queue, ticket):
                    self._end(ticket, 0, "")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for queue in self._queues:
                for piece in queue:
                    self._end(piece.ticket, CLOSED, "the reader was closed before this read began")
                queue.clear()
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._lock:
            for file in self._files:
                os.close(file.buffered)
                if file.direct is not None:
                    os.close(file.direct)
            self._files.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (any(self._queues) or self._closed):
                    self._work.wait()
                queue = next(filter(None, self._queues), None)
                if queue is None:
                    return
                piece = queue.popleft()
                file = self._files[piece.file]
                if self._flying == 0:
                    self._since = time.perf_counter()
                self._flying += 1
            got, code, message = _read(file, piece)
            with self._lock:
                self._flying -= 1
                if self._flying == 0:
                    self.seconds_busy += time.perf_counter() - self._since
                self.bytes_read += got
                self._end(piece.ticket, code, message)

    def _end(self, ticket: int, code: int, message: str) -> None:
        state = self._tickets[ticket]
        state.left -= 1
        if code and not state.code:
            state.code, state.message = code, message
        if not state.left:
            self._ended.append(ticket)
            if not state.code:
                del self._tickets[ticket]
            self._finished.notify_all()


def _taken(queue: deque[_Piece], ticket: int) -> list[_Piece]:
    """The ticket's pieces, which leave the queue."""
    taken = [piece for piece in queue if piece.ticket == ticket]
    rest = [piece for piece in queue if piece.ticket != ticket]
    queue.clear()
    queue.extend(rest)
    return taken


def _read(file: _File, piece: _Piece) -> tuple[int, int, str]:
    """(bytes got, code, message)."""
    target = memoryview((ctypes.c_char * piece.nbytes).from_address(piece.address)).cast("B")
    wanted = max(0, min(piece.nbytes, file.size - piece.offset))
    beyond = piece.offset + piece.nbytes - -(-file.size // _BLOCK) * _BLOCK
    where = f"{piece.nbytes} bytes at {piece.offset} of {file.path}, which has {file.size} bytes"
    if beyond > 0:
        return 0, END, where
    even = not (piece.offset | piece.nbytes | piece.address) % _BLOCK
    direct = file.direct is not None and even
    got = 0
    while got < wanted:
        fd = file.direct if direct and file.direct is not None else file.buffered
        try:
            count = os.preadv(fd, [target[got:]], piece.offset + got)
        except OSError as error:
            if direct and error.errno == errno.EINVAL:
                direct = False
                continue
            return got, error.errno or errno.EIO, where
        if count == 0:
            return got, END, where + " no more"
        got += count
        # A direct read that stops in the middle of a block cannot go on directly.
        direct = direct and got % _BLOCK == 0
    if not direct and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.buffered, piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)
    return got, 0, ""
