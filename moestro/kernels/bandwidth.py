"""How fast this machine reads memory: the bound on tokens per second of everything that is resident."""

from __future__ import annotations

import threading
import time

import numpy as np

from moestro.kernels import native
from moestro.kernels.reader import aligned


def probe(seconds: float = 0.2, *, threads: int = 0, nbytes: int = 256 << 20) -> float:
    """Bytes per second that `threads` (0: all cores) read together from a buffer of `nbytes`, larger than the caches.

    The best pass within about `seconds` counts, for a busy neighbour only ever slows it down.
    """
    return max(passes(seconds, threads=threads, nbytes=nbytes))


def passes(seconds: float = 0.2, *, threads: int = 0, nbytes: int = 256 << 20) -> list[float]:
    """The rate of each pass of `probe`: what else runs on the machine slows some, as it slows whatever they are compared with."""
    threads = threads or native.cores()
    buffer = aligned(nbytes)
    buffer[:: 4096 // 2] = 1
    found, stop = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < stop:
        found.append(one_pass(buffer, threads))
    return found


def one_pass(buffer: np.ndarray, threads: int) -> float:
    """Bytes per second at which uint8 [nbytes] is read once."""
    module = native.extension()
    if module is not None:
        return float(module.read_bandwidth(buffer.ctypes.data, buffer.nbytes, 0.0, threads))
    return reference_probe(buffer, 0.0, threads)


def reference_probe(buffer: np.ndarray, seconds: float, threads: int) -> float:
    """`probe` in numpy; np.bitwise_xor.reduce reads every word once without the interpreter lock."""
    words = buffer[: len(buffer) // 8 * 8].view(np.uint64)
    slices = np.array_split(words, threads)
    best, stop = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < stop:
        workers = [threading.Thread(target=np.bitwise_xor.reduce, args=(part,)) for part in slices]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, words.nbytes / (time.perf_counter() - began))
    return best
