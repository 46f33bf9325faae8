"""LRU: the expert that has not been used for the longest time leaves.

Paper      none; Mattson et al. 1970 showed the stack property
Idea       Routing repeats from token to token, so what was used last is likely to be used again.
Rule       victim = argmin over residents of the time of last use
Needs      nothing
Gives      a victim
Departs    nothing
Checked    0 hits on a cycle one longer than the cache, stack property, agrees with stack distances count for count
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.table import Moment


@method("engine.evict.lru", kind="eviction", fidelity="exact")
class Lru:
    """Least recently used. A prefetched expert counts as used when it is placed."""

    native = "lru"  # its form in kernels.replay, without options

    def __init__(self, capacity: int, layers: int) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        self._order.move_to_end(key)

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        self._order[key] = None

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        return next(key for key in self._order if key not in busy)
