"""LFU: the expert used least often leaves.

Paper      none
Idea       Some experts are popular; keep them. With a half-life old popularity fades, so the cache follows a change of topic.
Rule       f = uses so far, or with a half-life h: f = sum over uses of 2 ** (-(now - step of the use) / h)
           victim = argmin over residents of f, ties to the least recently used
Needs      nothing
Gives      a victim
Departs    uses are remembered after an expert has left ("perfect" LFU); an in-cache count forgets popular experts in a small cache
Checked    keeps the popular experts of independent Zipf routing better than LRU; a half-life recovers after a change of topic
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.evict.heap import ScoreHeap
from moestro.engine.table import Moment


@method("engine.evict.lfu", kind="eviction", fidelity="exact")
class Lfu:
    """Least frequently used. half_life: in forward passes; 0 counts for ever."""

    native = "lfu"  # its form in kernels.replay, without options

    def __init__(self, capacity: int, layers: int, *, half_life: float = 0.0) -> None:
        self._half_life = half_life
        self._uses: dict[ExpertKey, float] = {}  # with a half-life: log2 of the sum of 2 ** (step / h), which keeps the order
        self._heap = ScoreHeap()
        self._clock = itertools.count()

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        self.insert(key, moment)

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        old = self._uses.get(key)
        if not used:
            new = (-math.inf if self._half_life else 0.0) if old is None else old
        elif self._half_life:
            now = moment.step / self._half_life
            new = now if old is None or old == -math.inf else max(now, old) + math.log2(1 + 2.0 ** -abs(now - old))
        else:
            new = (old or 0.0) + 1
        self._uses[key] = new
        self._heap.put(key, (new, next(self._clock)))

    def remove(self, key: ExpertKey) -> None:
        self._heap.remove(key)

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        found = self._heap.least(busy)
        assert found is not None
        return found[1]
