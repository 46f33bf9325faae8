"""Asks for the next layer's experts while this layer computes.

Bound by a count, never by a clock, so that replay makes the same requests as the live engine. A wrong guess costs a read and
perhaps an eviction; it never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.core.routing import Array
from moestro.engine.table import Moment, Placement, SlotTable
from moestro.engine.widths import WidthTable

# A guess is read while at least this share of its like was right: about where the disk time lost equals the waiting saved.
TRUST, RATE = 0.6, 1 / 32


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What layer l's gate input says of layer l + 1, computed only if a predictor asks.

    Live: x_TD, layer l's gate input, and router, layer l + 1's, as router(x_TD, width) -> ids_TW, best first, W <= width.
    In replay: ahead_TW, the ids that the live run had recorded (best first, -1 for none).
    """

    x_TD: Array | None = None
    router: Callable[[Array, int], Array] | None = None
    ahead_TW: Array | None = None

    def ids(self, width: int) -> np.ndarray | None:
        """ids_TW with W <= width, best first; None when nothing is known."""
        if self.ahead_TW is not None:
            return np.asarray(self.ahead_TW)[:, :width]
        if self.router is None or self.x_TD is None:
            return None
        return np.asarray(self.router(self.x_TD, width))[:, :width]


@runtime_checkable
class Predictor(Protocol):
    """Guesses the experts of a layer to come. Made as `X(layers, num_experts, **options)`.

    It sees what has happened up to the layer that is about to compute, never more.
    """

    def observe(self, layer: int, experts_TK: Array, moment: Moment) -> None:
        """MoE layer `layer` routed T tokens to experts_TK (-1: empty slot)."""
        ...

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        """Distinct expert ids of MoE layer `layer`, the likeliest first.

        `layer` is the one after the layer observed last, or 0 (of the next pass) after the last one; `glimpse` is given by
        the layer observed last, and is None for layer 0.
        """
        ...


class Prefetcher:
    """Joins a predictor to a slot table, and believes it as far as it has lately been right.

    Only guesses of experts that are not in memory count, whether they were read or not: belief is a running share, per rank
    and per layer, of those that the layer then asked for. A guess is read while both are at least `trust`. A wrong one costs
    idle time of the disk, for the table lets go of it as soon as its layer is routed and the reader drops what it has not begun.

    Args:
        predictor: who guesses.
        table: where the guesses get slots.
        width: how many of the best guesses to look at per layer; 0 switches prefetching off.
        trust: 0 believes everything.
    """

    def __init__(self, predictor: Predictor, table: SlotTable | WidthTable, width: int, trust: float = TRUST) -> None:
        self.predictor, self.table, self.width, self.trust = predictor, table, width, trust
        self._beliefs = tuple(_Belief(width, table.layers, trust) for _ in range(2))
        self._guessed: list[tuple[int, int]] = []  # (rank, expert) of the layer to come that were not in memory

    def routed(self, experts_TK: Array, moment: Moment, glimpse: Glimpse | None = None) -> list[Placement]:
        """To be called once per layer and pass: its routing is known, its last wave has been placed, its compute has not begun.

        Returns the placements to be read without hurry: of layer l + 1, or after the last layer of layer 0 of the next pass.
        """
        if not self.width:
            return []
        layer, belief = moment.layer, self._beliefs[moment.prefill]
        if self._guessed:
            belief.learn(layer, self._guessed, set(experts_TK.reshape(-1).tolist()))
        self.predictor.observe(layer, experts_TK, moment)
        following = (layer + 1) % self.table.layers
        ranking = self.predictor.predict(following, glimpse if following else None)[: self.width]
        self._guessed = [(rank, e) for rank, e in enumerate(ranking) if (following, e) not in self.table]
        trusted = [ExpertKey(following, e) for rank, e in self._guessed if belief.of(following, rank) >= self.trust]
        return self.table.hint(trusted, moment, keep=[ExpertKey(following, e) for e in ranking]) if trusted else []


class _Belief:
    """Running shares of right guesses by rank and, for the ranks that are trusted, by layer. Both start at `trust`."""

    def __init__(self, ranks: int, layers: int, trust: float) -> None:
        self._ranks, self._layers, self._trust = [trust] * ranks, [trust] * layers, trust

    def of(self, layer: int, rank: int) -> float:
        return min(self._layers[layer], self._ranks[rank])

    def learn(self, layer: int, guessed: list[tuple[int, int]], used: set[int]) -> None:
        for rank, expert in guessed:
            right = expert in used
            if self._ranks[rank] >= self._trust:  # the layer answers for no rank that nobody believes
                self._layers[layer] += RATE * (right - self._layers[layer])
            self._ranks[rank] += RATE * (right - self._ranks[rank])
