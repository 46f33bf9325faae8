"""Slots of several sizes: experts of one width share a pool of slots that are just as large.

One size for all would give the narrowest expert as much memory as the widest. The pools are `SlotTable`s of their own, driven in step.
Shapes: L MoE layers, E experts, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.engine.store import pages
from moestro.engine.table import Counts, Eviction, Moment, Placement, SlotTable, Wave


class Widths(NamedTuple):
    """Which expert has which width and what it takes. slot_bytes_W: of the widest expert's slot of each width."""

    widths_LE: tuple[tuple[int, ...], ...]
    bytes_LE: tuple[tuple[int, ...], ...]
    slot_bytes_W: tuple[int, ...]

    @classmethod
    def of(cls, widths_LE: Sequence[Sequence[int]], bytes_LE: Sequence[Sequence[int]]) -> Widths:
        """From each expert's width and the bytes that it takes."""
        pairs = [pair for row in zip(widths_LE, bytes_LE, strict=True) for pair in zip(*row, strict=True)]
        most = [max((size for w, size in pairs if w == width), default=0) for width in range(max(w for w, _ in pairs) + 1)]
        return cls(tuple(map(tuple, widths_LE)), tuple(map(tuple, bytes_LE)), tuple(map(pages, most)))

    @property
    def experts_W(self) -> tuple[int, ...]:
        """How many experts have each width."""
        return tuple(sum(row.count(w) for row in self.widths_LE) for w in range(len(self.slot_bytes_W)))

    def first(self, layers: int) -> Widths:
        """Of the first layers only."""
        return self._replace(widths_LE=self.widths_LE[:layers], bytes_LE=self.bytes_LE[:layers])

    def least_W(self, top_k: Sequence[int]) -> tuple[int, ...]:
        """The fewest slots of each width with which the experts of any one token and layer fit."""
        return tuple(max(min(k, row.count(w)) for row, k in zip(self.widths_LE, top_k)) for w in range(len(self.slot_bytes_W)))

    def read(self, placements: Iterable[Placement]) -> int:
        """Bytes of what has to be read of them."""
        return sum(self.bytes_LE[p.key[0]][p.key[1]] for p in placements if not p.hit)


class WidthTable:
    """A `SlotTable` whose pools are the widths.

    Args:
        slots: one number per width; at least one, and more than the pinned experts of the width.
        eviction, layers, pinned: as SlotTable takes them.
        widths_LE: each expert's width.
    """

    scope = "width"

    def __init__(
        self,
        slots: Sequence[int],
        eviction: Callable[[int, int], Eviction],
        widths_LE: Sequence[Sequence[int]],
        *,
        layers: int,
        pinned: Iterable[ExpertKey] = (),
    ) -> None:
        if len(slots) <= max(max(row) for row in widths_LE):
            raise InputError(
                f"{len(slots)} numbers of slots with scope 'width'", expected="one per width", fix="make the plan again"
            )
        self.slots, self.layers, self._widths_LE = tuple(int(n) for n in slots), layers, widths_LE
        kept = [ExpertKey(*key) for key in pinned]
        self._tables: list[SlotTable] = []
        for width, size in enumerate(self.slots):
            mine = [key for key in kept if widths_LE[key.layer][key.expert] == width]
            first = sum(self.slots[:width])
            self._tables.append(SlotTable([size], "global", eviction, layers=layers, pinned=mine, first=first))

    def _table(self, key: ExpertKey) -> SlotTable:
        return self._tables[self._widths_LE[key[0]][key[1]]]

    def _split(self, keys: Iterable[ExpertKey]) -> list[list[ExpertKey]]:
        parts: list[list[ExpertKey]] = [[] for _ in self._tables]
        for key in keys:
            parts[self._widths_LE[key[0]][key[1]]].append(key)
        return parts

    def __len__(self) -> int:
        return sum(map(len, self._tables))

    def __contains__(self, key: object) -> bool:
        return any(key in table for table in self._tables)

    @property
    def pinned(self) -> dict[ExpertKey, int]:
        """The pinned experts and their slots."""
        return {key: slot for table in self._tables for key, slot in table.pinned.items()}

    def slot_of(self, key: ExpertKey) -> int | None:
        """The slot of a resident key, else None."""
        return self._table(key).slot_of(key)

    def residents(self) -> tuple[ExpertKey, ...]:
        """Every resident key, width by width."""
        return tuple(key for table in self._tables for key in table.residents())

    def counts(self, *, prefill: bool | None = None, layer: int | None = None) -> Counts:
        """As SlotTable.counts."""
        return sum((table.counts(prefill=prefill, layer=layer) for table in self._tables), Counts())

    def reset_counts(self) -> None:
        """Count from zero again; residents stay."""
        for table in self._tables:
            table.reset_counts()

    def room(self, layer: int) -> int:
        """How many unpinned experts of MoE layer `layer` can be leased now, whatever their widths."""
        return min(table.room(layer) for table in self._tables)

    def demand(self, keys: Iterable[ExpertKey], moment: Moment) -> list[Placement]:
        """As SlotTable.demand; the keys of each width must fit."""
        keys = list(keys)
        found = [p for table, part in zip(self._tables, self._split(keys)) for p in table.demand(part, moment)]
        return _ordered(found, keys)

    def waves(self, keys: Iterable[ExpertKey], moment: Moment) -> Iterator[Wave]:
        """As SlotTable.waves: each wave holds one of every width that has one left."""
        keys = list(keys)
        parts = [table.waves(part, moment) for table, part in zip(self._tables, self._split(keys))]
        going = parts
        try:
            while going:
                waves = [next(part) for part in going]
                going = [part for part, wave in zip(going, waves) if not wave.last]
                placements = _ordered([p for wave in waves for p in wave.placements], keys)
                yield Wave(placements, not going, [left for wave in waves for left in wave.withdrawn])
        finally:  # a width that had no more waves has been leased until here
            for part in parts:
                part.close()  # type: ignore[attr-defined]

    def use(self, keys: Sequence[ExpertKey], moment: Moment) -> Sequence[tuple[ExpertKey, int]] | None:
        """As SlotTable.use."""
        parts = self._split(keys)
        for table, part in zip(self._tables, parts):
            if sum(key not in table.pinned for key in part) > table.room(moment.layer):
                return None
        return [left for table, part in zip(self._tables, parts) for left in table.use(part, moment) or ()]

    def use_all(self, step: int, prefill: bool, layers: Sequence[int], experts_LK: np.ndarray) -> None:
        """As SlotTable.use_all."""
        for layer, experts in zip(layers, experts_LK.tolist(), strict=True):
            withdrawn = self.use([ExpertKey(layer, e) for e in sorted(experts)], Moment(step, layer, prefill))
            assert withdrawn is not None, "residents fit"

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """End one lease of each key."""
        for table, part in zip(self._tables, self._split(keys)):
            table.release(part)

    def hint(
        self, keys: Iterable[ExpertKey], moment: Moment, *, keep: Iterable[ExpertKey] = (), spare_current: bool = True
    ) -> list[Placement]:
        """As SlotTable.hint."""
        keys, spared = list(keys), self._split(keep)
        parts = zip(self._tables, self._split(keys), spared)
        found = [p for table, part, keep in parts for p in table.hint(part, moment, keep=keep, spare_current=spare_current)]
        return _ordered(found, keys)

    def drop(self, key: ExpertKey) -> None:
        """As SlotTable.drop."""
        self._table(key).drop(key)


def table_of(
    slots: Sequence[int],
    scope: str,
    eviction: Callable[[int, int], Eviction],
    *,
    layers: int,
    pinned: Iterable[ExpertKey] = (),
    widths: Widths | None = None,
) -> SlotTable | WidthTable:
    """The table of this scope: 'global', 'layer', or 'width', which wants `widths`. Raises InputError."""
    if scope != "width":
        return SlotTable(slots, scope, eviction, layers=layers, pinned=pinned)
    if widths is None:
        raise InputError("scope is 'width', and the experts have one width", expected="'global' or 'layer'")
    return WidthTable(slots, eviction, widths.widths_LE, layers=layers, pinned=pinned)


def staying(
    slots: Sequence[int], scope: str, facts: ModelFacts, pinned: Sequence[ExpertKey], widths: Widths | None = None
) -> list[ExpertKey]:
    """The experts beside `pinned` that would never leave, for their pool has a slot for each of its experts. Slots, scope: as `table_of` takes them.

    A table keeps one slot that is nobody's own, so one expert of each such pool is not among them; it stays all the same.
    """
    members: list[list[ExpertKey]] = [[] for _ in slots]
    for la in facts.layers:
        for e in range(la.num_experts):
            pool = (
                widths.widths_LE[la.ordinal][e]
                if scope == "width" and widths is not None
                else la.ordinal
                if scope == "layer"
                else 0
            )
            members[pool].append(ExpertKey(la.ordinal, e))
    own = set(pinned)
    free = [[key for key in some if key not in own] for size, some in zip(slots, members, strict=True) if size >= len(some)]
    return [key for some in free for key in some[:-1]]


def _ordered(placements: list[Placement], keys: Sequence[ExpertKey]) -> list[Placement]:
    """Residents first, each kind in the order of the keys."""
    place = {key: i for i, key in enumerate(keys)}
    return sorted(placements, key=lambda p: (not p.hit, place[p.key]))


def split_evenly(capacity: int, widths: Widths, low_W: Sequence[int]) -> tuple[int, ...]:
    """slots_W for `capacity` bytes: of every width the same share of its experts, as far as `low_W` allows."""
    return fill(capacity, widths, low_W, np.asarray(widths.experts_W, np.float64))


def fill(capacity: int, widths: Widths, low_W: Sequence[int], weights_W: np.ndarray) -> tuple[int, ...]:
    """slots_W in proportion to the weights, between low_W and the number of experts, whose bytes are at most `capacity`.

    What rounding leaves goes to the widest that still fits. `capacity` must hold low_W.
    """
    size_W, high_W = np.asarray(widths.slot_bytes_W), np.asarray(widths.experts_W)
    low, weights_W = np.asarray(low_W), np.maximum(weights_W, 1e-9)
    assert (low * size_W).sum() <= capacity, "too little for one token's experts"
    least, most = 0.0, float((high_W / weights_W).max()) + 1
    for _ in range(200):
        middle = (least + most) / 2
        slots = np.clip(np.floor(middle * weights_W), low, high_W)
        least, most = (middle, most) if (slots * size_W).sum() <= capacity else (least, middle)
    slots_W = np.clip(np.floor(least * weights_W), low, high_W).astype(np.int64)
    for w in np.argsort(-size_W, kind="stable"):
        slots_W[w] += min(high_W[w] - slots_W[w], (capacity - int((slots_W * size_W).sum())) // size_W[w])
    return tuple(int(n) for n in slots_W)


def split_by_use(capacity: int, widths: Widths, low_W: Sequence[int], counts_LE: np.ndarray) -> tuple[int, ...]:
    """slots_W as the experts used most would need them: with these in memory for good, the fewest bytes would be read."""
    keys = [ExpertKey(la, e) for la, row in enumerate(widths.widths_LE) for e in range(len(row))]
    slots, high = list(low_W), widths.experts_W
    taken = [0] * len(slots)
    left = capacity - sum(n * size for n, size in zip(slots, widths.slot_bytes_W))
    for key in sorted(keys, key=lambda key: -counts_LE[key]):
        w = widths.widths_LE[key.layer][key.expert]
        taken[w] += 1
        if taken[w] <= slots[w] or slots[w] == high[w]:
            continue
        if widths.slot_bytes_W[w] > left:
            break
        slots[w] += 1
        left -= widths.slot_bytes_W[w]
    return tuple(slots)
