"""Experts in memory: slots of one aligned pool, filled by the reader, lent out by leases.

The `SlotTable` decides who gets which slot; the cache does what it decided. An expert in use is never evicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.engine.store import ExpertStore, arrived
from moestro.engine.table import Moment, Placement, SlotTable
from moestro.kernels.ffn import ExpertView
from moestro.kernels.reader import Reader, aligned


class Lease:
    """The right to use some experts for a while. last: no further lease of the same demand follows."""

    def __init__(self, cache: ExpertCache, placements: Sequence[Placement], last: bool = True) -> None:
        self.cache, self.placements, self.last = cache, placements, last

    def ready(self) -> Iterator[tuple[ExpertKey, ExpertView]]:
        """Each expert once: those in memory first, then the others as they land, in the order of their reads."""
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[tuple[ExpertKey, ExpertView]]]:
        """As `ready`, but all that are there at a time together: computing several at once keeps every core busy."""
        cache = self.cache
        here = [(p.key, cache.views[p.key]) for p in self.placements if p.key in cache.views]
        if here:
            yield here
        known = {key for key, _ in here}
        waiting = sorted((cache.tickets[p.key], p.key) for p in self.placements if p.key not in known)
        while waiting:
            landed = [(waiting[0][1], cache.land(waiting[0][1]))]
            for _, key in waiting[1:]:
                if not cache.landed(key):
                    break
                landed.append((key, cache.land(key)))
            yield landed
            del waiting[: len(landed)]


class ExpertCache:
    """Slots filled from a store by a reader, as a table decides.

    The store must be attached to the reader. The pool's pages cost nothing until they are first used. views: experts in
    memory and runnable. tickets: experts on their way. Hits and misses are counted by the table.
    """

    def __init__(self, store: ExpertStore, table: SlotTable, reader: Reader) -> None:
        self.store, self.table, self.reader = store, table, reader
        self.views: dict[ExpertKey, ExpertView] = {}
        self.tickets: dict[ExpertKey, int] = {}
        self._bytes = {True: 0, False: 0}
        self._failed: set[ExpertKey] = set()
        self._pool = aligned(sum(table.slots) * store.slot_bytes)

    @property
    def pool_bytes(self) -> int:
        """Size of the slots when all are used."""
        return self._pool.nbytes

    def bytes_read(self, *, prefill: bool) -> int:
        """Bytes asked of the disk in a phase, prefetches included, since the last `reset`."""
        return self._bytes[prefill]

    def slot(self, number: int) -> np.ndarray:
        """The bytes of one slot."""
        size = self.store.slot_bytes
        return self._pool[number * size : (number + 1) * size]

    @contextlib.contextmanager
    def acquire(self, keys: Sequence[ExpertKey], moment: Moment) -> Iterator[Lease]:
        """Lend these experts within a `with` block, reading those that are not in memory. They must fit: see SlotTable.demand."""
        try:
            placements = self.table.demand(keys, moment)
            try:
                self.fetch(placements, moment)
                yield Lease(self, placements)
            finally:
                self.table.release([p.key for p in placements])
        except BaseException:
            self._sweep()
            raise

    def waves(self, keys: Iterable[ExpertKey], moment: Moment) -> Generator[Lease, None, None]:
        """Lend these experts in as many leases as the slots need; the reads of each have been started when it is given.

        How long a lease lasts is said at SlotTable.waves. Close the generator to end all of them.
        """
        waves = self.table.waves(keys, moment)
        try:
            for wave in waves:
                self.fetch(wave.placements, moment)
                yield Lease(self, wave.placements, wave.last)
        except BaseException:
            waves.close()  # type: ignore[attr-defined]
            self._sweep()
            raise

    def fetch(self, placements: Iterable[Placement], moment: Moment, *, urgent: bool = True) -> None:
        """Start the reads of what the table has placed; a prefetch that is now needed becomes urgent."""
        for p in placements:
            if p.hit:
                if urgent and (ticket := self.tickets.get(p.key)) is not None:
                    self.reader.promote(ticket)
                continue
            if p.evicted is not None:
                self._evict(p.evicted)
            reads = self.store.reads(p.key, self.slot(p.slot))
            self.tickets[p.key] = self.reader.submit(reads, urgent=urgent)
            self._bytes[moment.prefill] += sum(r.nbytes for r in reads)

    def _evict(self, key: ExpertKey) -> None:
        """Let go of an expert whose slot gets other bytes; a read still on its way there has to end first."""
        self.views.pop(key, None)
        self._failed.discard(key)
        if (ticket := self.tickets.pop(key, None)) is not None:
            with contextlib.suppress(OSError, EOFError):  # nobody asks for it any more
                self.reader.wait(ticket)

    def landed(self, key: ExpertKey) -> bool:
        """Whether an expert's bytes are there."""
        return key in self.views or self.reader.done(self.tickets[key])

    def land(self, key: ExpertKey) -> ExpertView:
        """Wait for an expert on its way. Raises what its read or its check raised; it then leaves the table with its lease."""
        if key in self.views:
            return self.views[key]
        number = self.table.slot_of(key)
        assert number is not None, f"{key} has no slot"
        try:
            arrived(self.reader, self.tickets[key], key)
            view = self.store.finish(key, self.slot(number))
        except Exception:
            self._failed.add(key)
            del self.tickets[key]
            raise
        del self.tickets[key]
        self.views[key] = view
        return view

    def _sweep(self) -> None:
        """After an error: what failed, or was placed but never read, is no resident."""
        for key in self.table.residents():
            if key in self._failed or (key not in self.views and key not in self.tickets):
                self.table.drop(key)
        self._failed.clear()

    def drain(self) -> None:
        """Wait for every read on its way, as before the slots go."""
        for ticket in self.tickets.values():
            with contextlib.suppress(OSError, EOFError, ValueError):
                self.reader.wait(ticket)
        self.tickets = {key: ticket for key, ticket in self.tickets.items() if key in self.table}

    def reset(self) -> None:
        """Start counting anew; what is in memory stays."""
        self._bytes = {True: 0, False: 0}
        self.table.reset_counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drain()
