"""Belady: the expert whose next use is farthest away leaves. For replay only: it knows the future.

Paper      none; Belady 1966, Mattson et al. 1970
Idea       The bound that no policy can beat, so that what is left to gain is known before anything is tried.
Rule       victim = argmax over residents of the time of next use, never counting as farthest
Needs      future: for each expert the forward passes that use it, ascending
Gives      a victim
Departs    when a pass needs more experts of a layer than there are slots, what enters together is no longer free to choose, and the
           bound is only near
Checked    equals brute force over all decisions on small traces; no policy has more hits (a law)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.evict.heap import ScoreHeap
from moestro.engine.table import Moment

NEVER = 1 << 62


@method("engine.evict.belady", kind="eviction", fidelity="exact", needs=("future",))
class Belady:
    """Farthest next use. future: key -> steps of its demands, ascending."""

    native = "belady"  # its form in kernels.replay, without options

    def __init__(self, capacity: int, layers: int, future: Mapping[ExpertKey, Sequence[int]]) -> None:
        self._future = future
        self._heap = ScoreHeap()

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        self.insert(key, moment)

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        steps = self._future.get(key, ())
        # A prefetched expert's layer is still to come in this pass, if it lies ahead.
        after = moment.step - (not used and key[0] > moment.layer)
        position = bisect_right(steps, after)
        next_use = steps[position] if position < len(steps) else NEVER
        self._heap.put(key, (-next_use, -key[0]))

    def remove(self, key: ExpertKey) -> None:
        self._heap.remove(key)

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        found = self._heap.least(busy)
        assert found is not None
        return found[1]
