"""Experts in memory: slots of one aligned pool, filled by the reader, lent out by leases.

The `SlotTable` decides who gets which slot; the cache does what it decided. An expert in use is never evicted.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.engine.store import ExpertStore, Views, arrived
from moestro.engine.table import Moment, Placement, SlotTable
from moestro.engine.widths import WidthTable
from moestro.kernels.ffn import ExpertView
from moestro.kernels.reader import Hurry, Populated, Reader, aligned
from moestro.kernels.step import Shelf


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
        cache, views = self.cache, self.cache.views
        here, waiting = [], []
        for placement in self.placements:
            key = placement.key
            if (view := views.get(key)) is not None:
                here.append((key, view))
            else:
                waiting.append((cache.tickets[key], key))
        if here:
            yield here
        waiting.sort()
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

    The store must be attached to the reader. A large pool's pages get their memory beside whatever comes next, such as loading a trunk. views: experts in
    memory and runnable. shelf: the same for native code, kept if it is given. tickets: experts on their way. slot_bytes: of each pool
    of the table, where the store's is too much for some. Hits and misses are counted by the table.
    """

    def __init__(
        self,
        store: ExpertStore,
        table: SlotTable | WidthTable,
        reader: Reader,
        shelf: Shelf | None = None,
        slot_bytes: Sequence[int] | None = None,
    ) -> None:
        self.store, self.table, self.reader = store, table, reader
        self.views: dict[ExpertKey, ExpertView] = {}
        self.tickets: dict[ExpertKey, int] = {}
        self._bytes = {True: 0, False: 0}
        self._torn = False  # an error broke off what belongs together: some residents may have no bytes
        self._early: dict[ExpertKey, int] = {}  # tickets of experts that nobody has asked for yet; see `preload`
        self._landing: dict[int, int] = {}  # slots that a read nobody wants any more is still filling, and its ticket
        self._made: dict[int, Views] = {}  # of each slot
        sizes = [store.slot_bytes] * len(table.slots) if slot_bytes is None else slot_bytes
        self._starts = [0, *itertools.accumulate(size for n, size in zip(table.slots, sizes, strict=True) for _ in range(n))]
        self._pool = aligned(self._starts[-1])
        self._populated = Populated(self._pool)
        self.shelf = shelf

    @property
    def pool_bytes(self) -> int:
        """Size of the slots when all are used."""
        return self._pool.nbytes

    def bytes_read(self, *, prefill: bool) -> int:
        """Bytes asked of the disk in a phase, prefetches included, since the last `reset`."""
        return self._bytes[prefill]

    def slot(self, number: int) -> np.ndarray:
        """The bytes of one slot."""
        return self._pool[self._starts[number] : self._starts[number + 1]]

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
                for key, slot in wave.withdrawn:
                    self._leave(key, slot)
                self.fetch(wave.placements, moment)
                yield Lease(self, wave.placements, wave.last)
        except BaseException as error:
            waves.close()  # type: ignore[attr-defined]
            if self._torn or not isinstance(error, GeneratorExit):
                self._sweep()
            raise

    def resident(self, experts: Sequence[int], moment: Moment) -> list[ExpertView] | None:
        """These experts of layer moment.layer as they are, if all are runnable: a demand without a lease, which ends at the next one."""
        views, layer = self.views, moment.layer
        found = [views.get(ExpertKey(layer, e)) for e in experts]
        if None in found:
            return None
        withdrawn = self.table.use([ExpertKey(layer, e) for e in sorted(experts)], moment)
        if withdrawn is None:
            return None
        for key, slot in withdrawn:
            self._leave(key, slot)
        return found  # type: ignore[return-value]

    def preload(self) -> None:
        """Read the experts that have a slot of their own, the table's pinned ones, whenever the disk has nothing else to do.

        Only when their bytes come changes by it: the first demand of each still counts as a miss.
        """
        for key, slot in sorted(self.table.pinned.items()):
            if key not in self.table and key not in self._early:
                self._early[key] = self.reader.submit(self.store.reads(key, self.slot(slot)), Hurry.IDLE)

    def fetch(self, placements: Iterable[Placement], moment: Moment, hurry: Hurry = Hurry.NOW) -> None:
        """Start the reads of what the table has placed; what is being read with less hurry gets so much."""
        try:
            self._fetch(placements, moment, hurry)
        except BaseException:
            self._torn = True
            raise

    def _fetch(self, placements: Iterable[Placement], moment: Moment, hurry: Hurry) -> None:
        late: list[Placement] = []
        for p in placements:
            if p.hit:
                if hurry == Hurry.NOW and p.prefetched and (ticket := self.tickets.get(p.key)) is not None:
                    self.reader.promote(ticket)
                continue
            if p.evicted is not None:
                self._leave(p.evicted, p.slot)
            if p.slot in self._landing:
                late.append(p)  # all other reads are started before this one has to wait
            else:
                self._read(p, moment, hurry)
        for p in late:
            with contextlib.suppress(OSError, EOFError):  # nobody asks for those bytes any more
                self.reader.wait(self._landing.pop(p.slot))
            self._read(p, moment, hurry)

    def _read(self, placement: Placement, moment: Moment, hurry: Hurry) -> None:
        reads = self.store.reads(placement.key, self.slot(placement.slot))
        if (ticket := self._early.pop(placement.key, None)) is not None:
            self.reader.promote(ticket, hurry)
        else:
            ticket = self.reader.submit(reads, hurry)
        self.tickets[placement.key] = ticket
        self._bytes[moment.prefill] += sum(r.nbytes for r in reads)

    def _leave(self, key: ExpertKey, slot: int) -> None:
        """Let go of an expert whose slot is free for other bytes; what has not been read of it never is."""
        self._lose(key)
        if (ticket := self.tickets.pop(key, None)) is not None:
            self.reader.cancel(ticket)
            if not self.reader.done(ticket):
                self._landing[slot] = ticket

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
            view = self.store.finish(key, self.slot(number), self._made.setdefault(number, {}))
        except Exception:
            self._torn = True
            del self.tickets[key]
            raise
        del self.tickets[key]
        self.views[key] = view
        if self.shelf is not None:
            self.shelf.put(*key, view)
        return view

    def _lose(self, key: ExpertKey) -> None:
        """No longer runnable, if it was."""
        if self.views.pop(key, None) is not None and self.shelf is not None:
            self.shelf.put(*key, None)

    def _sweep(self) -> None:
        """After an error: what failed, or was placed but never read, is no resident; what is no resident is forgotten."""
        for key in self.table.residents():
            if key not in self.views and key not in self.tickets:
                self.table.drop(key)
        for key in [key for key in (*self.views, *self.tickets) if key not in self.table]:
            self._lose(key)
            if (ticket := self.tickets.pop(key, None)) is not None:
                self.reader.cancel(ticket)
                with contextlib.suppress(OSError, EOFError, ValueError):
                    self.reader.wait(ticket)
        self._torn = False

    def drain(self) -> None:
        """Wait for every read on its way, as before the slots go."""
        self._populated.close()
        for ticket in self._early.values():
            self.reader.cancel(ticket)
        for ticket in (*self.tickets.values(), *self._landing.values(), *self._early.values()):
            with contextlib.suppress(OSError, EOFError, ValueError):
                self.reader.wait(ticket)
        self._landing.clear()
        self._early.clear()
        self.tickets = {key: ticket for key, ticket in self.tickets.items() if key in self.table}

    def forget(self) -> None:
        """Empty every slot, as before the store gives other bytes for the same experts. No expert may be in use."""
        self.drain()
        for key in self.table.residents():
            self.table.drop(key)
        for key in list(self.views):
            self._lose(key)
        self.tickets.clear()
        self._made.clear()

    def reset(self) -> None:
        """Start counting anew; what is in memory stays."""
        self._bytes = {True: 0, False: 0}
        self.table.reset_counts()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.drain()
