"""SLRU: an expert must be used twice before it is kept; the rest leaves first.

Paper      none; Karedla, Love, Wherry 1994
Idea       Two LRU lists. A newcomer is on probation; a second use protects it. One burst of new experts, as a prompt brings,
           then cannot flush what is used again and again.
Rule       first use -> head of probation; use on probation -> head of protected; overflow of protected -> head of probation
           victim = tail of probation, else tail of protected
Needs      nothing
Gives      a victim
Departs    nothing; a prefetched expert's first use counts as its first, not its second
Checked    a scan does not flush protected experts; protected = 0 is LRU, decision for decision
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Container

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.table import Moment


@method("engine.evict.slru", kind="eviction", fidelity="exact")
class Slru:
    """Segmented LRU. protected: share of the slots that only experts used twice may hold."""

    def __init__(self, capacity: int, layers: int, *, protected: float = 0.8) -> None:
        assert 0 <= protected <= 1, "protected is a share of the slots"
        self._limit = int(protected * capacity)
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()
        self._unused: set[ExpertKey] = set()

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        if key in self._protected:
            self._protected.move_to_end(key)
        elif key in self._unused or not self._limit:
            self._unused.discard(key)
            self._probation.move_to_end(key)
        else:
            del self._probation[key]
            self._protected[key] = None
            if len(self._protected) > self._limit:
                self._probation[self._protected.popitem(last=False)[0]] = None

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        self._probation[key] = None
        if not used:
            self._unused.add(key)

    def remove(self, key: ExpertKey) -> None:
        self._unused.discard(key)
        del (self._probation if key in self._probation else self._protected)[key]

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        return next(key for key in itertools.chain(self._probation, self._protected) if key not in busy)
