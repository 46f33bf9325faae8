"""EdgeMoE: the expert that is rarely used and whose layer is far away leaves.

Paper      Yi, Guo, Wei et al. 2023, arXiv 2308.14352
Idea       A decoder runs its layers in a fixed cycle, so how long until a layer runs again is known; together with how often an
           expert is used it says how soon it will be missed.
Rule       L = -f / d, f = uses of the expert so far, d = (its layer - layer now) mod S, 0 counting as S; victim = argmax L
Needs      nothing
Gives      a victim
Departs    the paper prints d = (S - layer + layer now) mod S, the distance behind, which contradicts its text (far layers
           leave first); this is the distance ahead. Equal values: the farther layer, then the least recently used, leaves.
           With slots per layer d is the same for all and the rule is LFU
Checked    of equally frequent experts one of the next layer never leaves before one of the layer just run
"""

from __future__ import annotations

import itertools
from collections.abc import Container

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.evict.heap import ScoreHeap
from moestro.engine.table import Moment


@method("engine.evict.edgemoe", kind="eviction", fidelity="adapted", paper="2308.14352")
class EdgeMoe:
    """Frequency over forward layer distance."""

    def __init__(self, capacity: int, layers: int) -> None:
        self._layers = layers
        self._uses: dict[ExpertKey, int] = {}
        self._heaps = [ScoreHeap() for _ in range(layers)]
        self._clock = itertools.count()

    def touch(self, key: ExpertKey, moment: Moment) -> None:
        self.insert(key, moment)

    def insert(self, key: ExpertKey, moment: Moment, used: bool = True) -> None:
        uses = self._uses[key] = self._uses.get(key, 0) + used
        self._heaps[key[0]].put(key, (uses, next(self._clock)))

    def remove(self, key: ExpertKey) -> None:
        self._heaps[key[0]].remove(key)

    def victim(self, busy: Container[ExpertKey], moment: Moment, incoming: ExpertKey) -> ExpertKey:
        best: tuple[tuple[float, int], ExpertKey] | None = None
        for distance in range(self._layers, 0, -1):
            heap = self._heaps[(moment.layer + distance) % self._layers]
            # Scores only grow, so the top of a heap is at most its true least: most heaps need no look.
            if not heap or (best is not None and heap.floor()[0] > best[0][0] * distance):
                continue
            if (least := heap.least(busy)) is not None:
                value = (least[0][0] / distance, -distance)
                if best is None or value < best[0]:
                    best = value, least[1]
        assert best is not None
        return best[1]
