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
    """Joins a predictor to a slot table.

    Args:
        predictor: who guesses.
        table: where the guesses get slots.
        width: how many of the best guesses to ask for per layer; 0 switches prefetching off.
    """

    def __init__(self, predictor: Predictor, table: SlotTable, width: int) -> None:
        self.predictor, self.table, self.width = predictor, table, width

    def routed(self, experts_TK: Array, moment: Moment, glimpse: Glimpse | None = None) -> list[Placement]:
        """To be called once per layer and pass: its routing is known, its last wave has been placed, its compute has not begun.

        Returns the placements to be read without hurry: of layer l + 1, or after the last layer of layer 0 of the next pass.
        """
        if not self.width:
            return []
        self.predictor.observe(moment.layer, experts_TK, moment)
        following = (moment.layer + 1) % self.table.layers
        guesses = self.predictor.predict(following, glimpse if following else None)[: self.width]
        return self.table.hint([ExpertKey(following, e) for e in guesses], moment) if guesses else []
