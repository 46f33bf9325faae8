"""A priority queue of resident experts whose scores change; the least leaves first."""

from __future__ import annotations

import heapq
from collections.abc import Container
from typing import Any

from moestro.core.experts import ExpertKey


class ScoreHeap:
    """Keys by score, least first. Changing a score leaves the old entry behind until it surfaces (lazy deletion)."""

    def __init__(self) -> None:
        self._score: dict[ExpertKey, Any] = {}
        self._heap: list[tuple[Any, ExpertKey]] = []

    def __len__(self) -> int:
        return len(self._score)

    def put(self, key: ExpertKey, score: Any) -> None:
        """Add `key` or change its score."""
        self._score[key] = score
        heapq.heappush(self._heap, (score, key))
        if len(self._heap) > 4 * len(self._score) + 64:
            self._heap = [(s, k) for k, s in self._score.items()]
            heapq.heapify(self._heap)

    def remove(self, key: ExpertKey) -> None:
        del self._score[key]

    def floor(self) -> Any:
        """A lower bound of all scores, if these never fall; the heap must not be empty."""
        return self._heap[0][0]

    def least(self, busy: Container[ExpertKey]) -> tuple[Any, ExpertKey] | None:
        """The least score and its key among those not in `busy`, ties to the lower key; None when all are busy."""
        heap, score, aside, found = self._heap, self._score, [], None
        while heap:
            top = heap[0]
            if score.get(top[1]) != top[0]:
                heapq.heappop(heap)
            elif top[1] in busy:
                aside.append(heapq.heappop(heap))
            else:
                found = top
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return found
