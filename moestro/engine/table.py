"""Which expert sits in which slot. Pure bookkeeping, no I/O: the live cache and replay drive this one object, so their counts agree.

Slots are numbered 0..sum(slots)-1. With scope 'global' all layers share one pool of slots, with scope 'layer' MoE layer l
owns slots[l] of them. Each pool has its own eviction policy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey

OWED = 64  # passes of which the policies are told at once


class Moment(NamedTuple):
    """Where a run stands. step: number of the forward pass; layer: MoE layer ordinal; prefill: the pass reads a prompt."""

    step: int
    layer: int
    prefill: bool


class Placement(NamedTuple):
    """One key's place. hit: it was resident when asked for, so nothing has to be read because of this demand.

    evicted: the expert that had to leave this slot, or None. prefetched: the hit is the first use of an expert that a hint
    placed; its read may still be under way.
    """

    key: ExpertKey
    slot: int
    hit: bool
    evicted: ExpertKey | None = None
    prefetched: bool = False


class Wave(NamedTuple):
    """A part of a demand that is resident and leased together. last: no further wave follows.

    withdrawn: (key, slot) of wrong guesses, which have left; given with the first wave.
    """

    placements: list[Placement]
    last: bool
    withdrawn: Sequence[tuple[ExpertKey, int]] = ()


@runtime_checkable
class Eviction(Protocol):
    """Decides who leaves. Made as `X(capacity, layers, **options)`, one per pool; `capacity` counts unpinned slots.

    The table calls, in this order: `victim` then `remove` for each expert that must leave, and then `insert` for each key
    that came and `touch` for each key that was there, in the order of the demand.
    """

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        """A resident key is used."""
        ...

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        """A key becomes resident; `used` is false when a prefetch placed it and nobody has asked for it yet."""
        ...

    def remove(self, key: ExpertKey) -> None:
        """A resident key leaves."""
        ...

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        """The resident key that should leave for `incoming`; never one of `busy`. There is always at least one choice.

        `busy` is only ever asked `key in busy`.
        """
        ...


@dataclass(slots=True)
class Counts:
    """What happened. demands = hits + misses, in experts; one expert counts once per layer and forward pass.

    hits: demanded and resident, with those a hint had placed. prefetch_issued: placed by hints; prefetch_used: of these,
    demanded before they left; prefetch_wasted: left without having been demanded (the rest is still waiting).
    """

    demands: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0

    @property
    def loads(self) -> int:
        """Experts read: missed ones and prefetched ones."""
        return self.misses + self.prefetch_issued

    @property
    def hit_rate(self) -> float:
        """Share of demands that were resident; 1 when nothing was demanded."""
        return self.hits / self.demands if self.demands else 1.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class _Pool:
    """A set of slots that one policy rules. leased: unpinned keys of it now in use."""

    __slots__ = ("capacity", "free", "leased", "policy")

    def __init__(self, first: int, capacity: int, policy: Eviction) -> None:
        self.capacity, self.policy, self.leased = capacity, policy, 0
        self.free = list(range(first + capacity - 1, first - 1, -1))


class SlotTable:
    """Residents, leases and counts.

    A demand leases its keys: a leased key is never evicted. `waves` is the general way to demand, `demand` + `release` the
    plain one for keys known to fit.

    Args:
        slots: scope 'global': one number; scope 'layer': one per MoE layer.
        scope: 'global' or 'layer'.
        eviction: called as eviction(capacity, layers) once per pool.
        layers: L, number of MoE layers.
        pinned: experts with a slot of their own; each is loaded at its first demand (a miss like any other) or hint and never
            leaves. They take slots from their pool, and the policy never hears of them.
        first: number of the first slot.

    Raises:
        InputError: an unknown scope, a wrong number of slots, or pinned experts that leave a pool without a free slot.
    """

    def __init__(
        self,
        slots: Sequence[int],
        scope: str,
        eviction: Callable[[int, int], Eviction],
        *,
        layers: int,
        pinned: Iterable[ExpertKey] = (),
        first: int = 0,
    ) -> None:
        if scope not in ("global", "layer"):
            raise InputError(f"scope is {scope!r}", expected="'global' or 'layer'")
        if len(slots) != (1 if scope == "global" else layers):
            raise InputError(
                f"{len(slots)} numbers of slots with scope {scope!r}",
                expected="one" if scope == "global" else f"one per MoE layer ({layers})",
            )
        self.slots, self.scope, self.layers = tuple(int(n) for n in slots), scope, layers
        self.pinned: dict[ExpertKey, int] = {}
        kept = dict.fromkeys(ExpertKey(*key) for key in pinned)
        pools = []
        for number, size in enumerate(self.slots):
            mine = [key for key in kept if scope == "global" or key.layer == number]
            if size <= len(mine):
                where = "" if scope == "global" else f" of layer {number}"
                raise InputError(
                    f"{len(mine)} pinned experts and {size} slots{where}",
                    expected="at least one slot more than pinned experts",
                    fix="pin fewer experts or give more memory",
                )
            self.pinned |= {key: first + i for i, key in enumerate(mine)}
            capacity = size - len(mine)
            pools.append(_Pool(first + len(mine), capacity, eviction(capacity, layers)))
            first += size
        self._pools = pools * layers if scope == "global" else pools
        self._slot: dict[ExpertKey, int] = {}
        self._leases: dict[ExpertKey, int] = {}
        self._waiting: dict[ExpertKey, None] = {}  # placed by a hint, not demanded yet; in the order of the hints
        self._current: Sequence[ExpertKey] = ()  # the latest demand
        self._counts = tuple([Counts() for _ in range(layers)] for _ in range(2))
        self._owed: list[tuple[int, bool, Sequence[int], np.ndarray]] = []  # of `use_all`, not told to the policies yet

    def __len__(self) -> int:
        return len(self._slot)

    def __contains__(self, key: object) -> bool:
        return key in self._slot

    def slot_of(self, key: ExpertKey) -> int | None:
        """The slot of a resident key, else None."""
        return self._slot.get(key)

    def residents(self) -> tuple[ExpertKey, ...]:
        """Every resident key, in order of arrival."""
        return tuple(self._slot)

    def policy(self, layer: int = 0) -> Eviction:
        """The policy that rules the slots of MoE layer `layer`."""
        self._settle()
        return self._pools[layer].policy

    def counts(self, *, prefill: bool | None = None, layer: int | None = None) -> Counts:
        """Counts of a phase (None: both) and of a layer (None: all)."""
        self._settle()
        rows = [row for i, row in enumerate(self._counts) if prefill is None or i == prefill]
        return sum((c for row in rows for i, c in enumerate(row) if layer is None or i == layer), Counts())

    def reset_counts(self) -> None:
        """Count from zero again; residents stay."""
        self._settle()
        for row in self._counts:
            row[:] = [Counts() for _ in row]

    def room(self, layer: int) -> int:
        """How many unpinned experts of MoE layer `layer` can be leased now."""
        pool = self._pools[layer]
        return pool.capacity - pool.leased

    def demand(self, keys: Iterable[ExpertKey], moment: Moment) -> list[Placement]:
        """Make all `keys` (of MoE layer moment.layer, one forward pass) resident and lease them until `release`.

        The keys must fit: at most `room(layer)` that are not pinned. Placements come residents first, then the missing,
        each in the given order. When a placement names an `evicted` key whose prefetch is still being read into that slot,
        the caller has to let that read end first.
        """
        self._settle()
        keys = list(dict.fromkeys(keys))
        self._current = keys
        slot = self._slot
        missing = [key for key in keys if key not in slot]
        if missing and len(missing) < len(keys):
            return self._lease([key for key in keys if key in slot] + missing, keys, moment)
        return self._lease(keys, keys, moment)

    def waves(self, keys: Iterable[ExpertKey], moment: Moment) -> Iterator[Wave]:
        """Demand `keys` in as many waves as the slots need; mostly one.

        When they do not fit together, residents come first, so that nothing needed is evicted before its use, and a wave
        takes half of the room: a wave stays leased until the one *after* the next is asked for. So a caller can start
        reading wave i + 1, compute wave i meanwhile, and then ask on. (With room for one expert only, a wave is released as
        soon as the next is asked for.) The end of the iteration, or closing it, releases everything.

        A guess for this layer that is not among `keys` was wrong: it leaves first, so that it costs a slot for one layer only.
        """
        self._settle()
        keys = list(dict.fromkeys(keys))
        withdrawn = self._withdraw(keys, moment) if self._waiting else ()
        loose = len(keys) - sum(key in self.pinned for key in keys) if self.pinned else len(keys)
        room = self.room(moment.layer)
        if loose <= room:
            placements = self.demand(keys, moment)
            try:
                yield Wave(placements, True, withdrawn)
            finally:
                self.release(keys)
            return
        assert room > 0, "a demand while every slot of the pool is leased"
        self._current = keys
        slot, pinned = self._slot, self.pinned
        ordered = [key for key in keys if key in pinned]  # they need no room: all in the first wave
        ordered += [key for key in keys if key in slot and key not in pinned]
        ordered += [key for key in keys if key not in slot and key not in pinned]
        width = max(1, room // 2)
        cuts = [0, *range(len(keys) - loose + width, len(keys), width), len(keys)]
        held: list[list[ExpertKey]] = []
        try:
            for start, stop in itertools.pairwise(cuts):
                while len(held) > (room > 1):
                    self.release(held.pop(0))
                held.append(ordered[start:stop])
                yield Wave(self._lease(held[-1], held[-1], moment), stop == len(keys), withdrawn if start == 0 else ())
        finally:
            for part in held:
                self.release(part)

    def use(self, keys: Sequence[ExpertKey], moment: Moment) -> Sequence[tuple[ExpertKey, int]] | None:
        """A demand of distinct `keys`, all resident, counted and told to the policy as by `waves`, but without a lease: they stay until the
        next demand. Returns the wrong guesses that have left; None when the keys do not fit together, and then nothing has happened.
        """
        self._settle()
        return self._use(keys, moment)

    def use_all(self, step: int, prefill: bool, layers: Sequence[int], experts_LK: np.ndarray) -> None:
        """`use` of experts_LK[i], all resident and distinct, in layers[i], in turn. Nothing may be on its way that was only guessed.

        The policies hear of it before anything is asked of the table that depends on it: many passes at once take a fraction of the time,
        for what they touch is then in the processor's caches.
        """
        assert not self._waiting, "nobody guesses"
        self._owed.append((step, prefill, layers, experts_LK))
        if len(self._owed) >= OWED:
            self._settle()

    def _settle(self) -> None:
        if not self._owed:
            return
        owed, self._owed = self._owed, []
        for step, prefill, layers, experts_LK in owed:
            for layer, experts in zip(layers, experts_LK.tolist(), strict=True):
                withdrawn = self._use([ExpertKey(layer, e) for e in sorted(experts)], Moment(step, layer, prefill))
                assert withdrawn is not None, "residents fit"

    def _use(self, keys: Sequence[ExpertKey], moment: Moment) -> Sequence[tuple[ExpertKey, int]] | None:
        pinned, waiting = self.pinned, self._waiting
        loose = [key for key in keys if key not in pinned] if pinned else keys
        if len(loose) > self.room(moment.layer):
            return None
        withdrawn = self._withdraw(keys, moment) if waiting else ()
        self._current = keys
        counts, policy = self._counts[moment.prefill][moment.layer], self._pools[moment.layer].policy
        counts.demands += len(keys)
        counts.hits += len(keys)
        for key in keys if waiting else ():
            if key in waiting:
                del waiting[key]
                counts.prefetch_used += 1
        for key in loose:
            policy.touch(key, moment)
        return withdrawn

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """End one lease of each key."""
        leases, pinned = self._leases, self.pinned
        for key in keys:
            if leases[key] > 1:
                leases[key] -= 1
                continue
            del leases[key]
            if key not in pinned:
                self._pools[key[0]].leased -= 1

    def hint(
        self, keys: Iterable[ExpertKey], moment: Moment, *, keep: Iterable[ExpertKey] = (), spare_current: bool = True
    ) -> list[Placement]:
        """Give slots to those of `keys` that are not resident, best first, as far as slots can be had without a lease.

        Never evicts a leased key, another key of this hint, one of `keep` nor, with `spare_current`, a key of the latest
        demand. `moment` is where the run stands, not when the keys are needed. Returns the placements to be read, none for
        resident keys; what cannot be placed is left out.
        """
        self._settle()
        wanted = list(dict.fromkeys(keys))
        slot = self._slot
        busy: set[ExpertKey] = set()
        asked: _Pool | None = None
        taken = 0  # residents of `asked` that may not leave
        placements: list[Placement] = []
        for key in wanted:
            if key in slot:
                continue
            pool, evicted = self._pools[key[0]], None
            if key in self.pinned:
                place = self.pinned[key]
            else:
                if not pool.free:
                    if asked is not pool:
                        asked = pool
                        busy = busy or {*self._leases, *wanted, *keep, *(self._current if spare_current else ())}
                        taken = sum(1 for k in busy if k in slot and k not in self.pinned and self._pools[k[0]] is pool)
                    if taken >= pool.capacity:
                        continue
                    evicted = self._evict(pool, busy, moment, key)
                    taken += 1
                place = pool.free.pop()
                pool.policy.insert(key, moment, False)
            slot[key] = place
            self._waiting[key] = None
            self._counts[moment.prefill][key[0]].prefetch_issued += 1
            placements.append(Placement(key, place, False, evicted))
        return placements

    def drop(self, key: ExpertKey) -> None:
        """Forget a resident key that is not leased, as when reading it failed. Not counted as an eviction."""
        assert key not in self._leases, f"{key} is in use"
        self._settle()
        place = self._slot.pop(key)
        self._waiting.pop(key, None)
        if key not in self.pinned:
            pool = self._pools[key.layer]
            pool.policy.remove(key)
            pool.free.append(place)

    def _withdraw(self, keys: Sequence[ExpertKey], moment: Moment) -> list[tuple[ExpertKey, int]]:
        """The layer of `moment` demands `keys`: what was only guessed for it leaves, unless it is pinned."""
        out = []
        for key in [k for k in self._waiting if k[0] == moment.layer and k not in keys and k not in self.pinned]:
            out.append((key, self._slot[key]))
            self._counts[moment.prefill][moment.layer].prefetch_wasted += 1
            self.drop(key)
        return out

    def _evict(self, pool: _Pool, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        out = pool.policy.victim(busy, moment, incoming)
        pool.policy.remove(out)
        pool.free.append(self._slot.pop(out))
        counts = self._counts[moment.prefill]
        counts[moment.layer].evictions += 1
        if out in self._waiting:
            del self._waiting[out]
            counts[out[0]].prefetch_wasted += 1
        return out

    def _lease(self, ordered: list[ExpertKey], told: list[ExpertKey], moment: Moment) -> list[Placement]:
        """Place and lease `ordered` (residents first); the policy hears of them in the order of `told`.

        That order does not depend on who was resident, so LRU keeps its stack property: more slots, never fewer hits.
        """
        slot, leases, pinned, waiting = self._slot, self._leases, self.pinned, self._waiting
        pool, counts = self._pools[moment.layer], self._counts[moment.prefill][moment.layer]
        for key in ordered:
            if key in leases:
                leases[key] += 1
            else:
                leases[key] = 1
                if key not in pinned:
                    pool.leased += 1
        assert pool.leased <= pool.capacity, "more experts in use than slots: demand them in waves"
        placements: list[Placement] = []
        missed: set[ExpertKey] = set()
        for key in ordered:
            place = slot.get(key)
            if place is not None:
                first = key in waiting
                if first:
                    del waiting[key]
                    counts.prefetch_used += 1
                placements.append(Placement(key, place, True, None, first))
                continue
            evicted = None
            if key in pinned:
                place = pinned[key]
            else:
                if not pool.free:
                    evicted = self._evict(pool, leases, moment, key)
                place = pool.free.pop()
                missed.add(key)
            slot[key] = place
            counts.misses += 1
            placements.append(Placement(key, place, False, evicted))
        counts.demands += len(ordered)
        counts.hits = counts.demands - counts.misses
        policy = pool.policy
        for key in told:
            if key in missed:
                policy.insert(key, moment)
            elif key not in pinned:
                policy.touch(key, moment)
        return placements


def needed(layer: int, experts_TK: np.ndarray) -> list[ExpertKey]:
    """The distinct experts that T tokens need at MoE layer `layer`: the most wanted first, ties to the lower id.

    experts_TK: integer ids, -1 in empty slots. The live engine and replay demand in this order.
    """
    ids = np.asarray(experts_TK).reshape(-1)
    if len(experts_TK) == 1:
        return [ExpertKey(layer, e) for e in sorted(ids.tolist()) if e >= 0]
    counts = np.bincount(ids[ids >= 0])
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return [ExpertKey(layer, e) for e in order.tolist()]
