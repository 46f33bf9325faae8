"""ARC: balances recency and frequency by what it regrets having evicted.

Paper      Megiddo, Modha, FAST 2003; used for mixture-of-experts caches by Fate, arXiv 2502.12224
Idea       T1 holds experts used once lately, T2 those used again; ghosts B1 and B2 remember who left each. A miss on a ghost of
           B1 says recency deserves more room, one on B2 frequency.
Rule       ghost hit in B1: p += max(1, |B2| / |B1|); in B2: p -= max(1, |B1| / |B2|); 0 <= p <= c
           victim = tail of T1 if |T1| > p, or |T1| = p and the newcomer is a ghost of B2; else tail of T2
Needs      nothing
Gives      a victim
Departs    a layer demands several experts at once, so several leave before the first enters; when one list's experts are all
           in use the other list gives the victim; a prefetched expert's first use counts as its first, not its second
Checked    |T1| + |T2| <= c, |T1| + |B1| <= c and all four <= 2c after every call; a scan does not flush what is used again
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.table import Moment


@method("engine.evict.arc", kind="eviction", fidelity="adapted", paper="2502.12224")
class Arc:
    """Adaptive replacement cache."""

    native = "arc"  # its form in kernels.replay, without options

    def __init__(self, capacity: int, layers: int) -> None:
        self._capacity = capacity
        self._target = 0.0  # p, the room that T1 should have
        self._t1: OrderedDict[ExpertKey, None] = OrderedDict()
        self._t2: OrderedDict[ExpertKey, None] = OrderedDict()
        self._b1: OrderedDict[ExpertKey, None] = OrderedDict()
        self._b2: OrderedDict[ExpertKey, None] = OrderedDict()
        self._unused: set[ExpertKey] = set()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """|T1|, |T2|, |B1|, |B2|."""
        return len(self._t1), len(self._t2), len(self._b1), len(self._b2)

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        if key in self._t2:
            self._t2.move_to_end(key)
        elif key in self._unused:
            self._unused.discard(key)
            self._t1.move_to_end(key)
        else:
            del self._t1[key]
            self._t2[key] = None

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        for ghosts in (self._b1, self._b2):
            if key in ghosts:
                del ghosts[key]
                self._t2[key] = None
                return
        self._t1[key] = None
        if not used:
            self._unused.add(key)
        if len(self._t1) + len(self._b1) > self._capacity:
            self._b1.popitem(last=False)
        if sum(self.sizes) > 2 * self._capacity:
            self._b2.popitem(last=False)

    def remove(self, key: ExpertKey) -> None:
        self._unused.discard(key)
        if key in self._t1:
            del self._t1[key]
            self._b1[key] = None
        else:
            del self._t2[key]
            self._b2[key] = None

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        b1, b2 = len(self._b1), len(self._b2)
        again = incoming in self._b2
        if incoming in self._b1:
            self._target = min(self._capacity, self._target + max(1.0, b2 / b1))
        elif again:
            self._target = max(0.0, self._target - max(1.0, b1 / b2))
        first = len(self._t1) > self._target or (again and len(self._t1) == self._target)
        for order in (self._t1, self._t2) if first else (self._t2, self._t1):
            for key in order:
                if key not in busy:
                    return key
        raise AssertionError("every resident is busy")
