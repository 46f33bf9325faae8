"""Pinned: the experts that a trace used most never leave; LRU rules the rest.

Paper      none
Idea       If some experts are popular whatever the text, keep them for good. It pays only where popularity is really skewed.
Rule       pins = the floor(share * slots) experts with the largest counts, leaving each pool at least top-k free slots
Needs      counts_LE of a trace
Gives      the keys to pin, and a victim among the others
Departs    nothing
Checked    pins are the most frequent, leave room for one token, and are read once
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.engine.evict.lru import Lru


@method("engine.evict.pinned", kind="eviction", fidelity="exact", needs=("counts",))
class Pinned(Lru):
    """LRU beside pinned experts. share: part of the slots that is pinned."""

    def __init__(self, capacity: int, layers: int, *, share: float = 0.5) -> None:
        assert 0 <= share <= 1, "share is a part of the slots"
        super().__init__(capacity, layers)

    @staticmethod
    def pins(
        counts_LE: np.ndarray, slots: Sequence[int], scope: str, top_k: Sequence[int], *, share: float = 0.5
    ) -> tuple[ExpertKey, ...]:
        """The experts to pin. slots and scope as for the slot table; top_k: K of each layer. Experts never used are not pinned."""
        chosen: list[ExpertKey] = []
        if scope == "global":
            pools = [(list(range(len(counts_LE))), slots[0], max(top_k))]
        else:
            pools = [([layer], size, top_k[layer]) for layer, size in enumerate(slots)]
        for layers, size, need in pools:
            counts = np.asarray(counts_LE)[layers].reshape(-1)
            room = min(int(share * size), size - need, int(np.count_nonzero(counts)))
            width = np.asarray(counts_LE).shape[1]
            for i in np.argsort(-counts, kind="stable")[: max(0, room)].tolist():
                chosen.append(ExpertKey(layers[i // width], i % width))
        return tuple(chosen)
