"""One sequence read by the engine, forwards and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moestro.core.errors import InputError

if TYPE_CHECKING:
    from moestro.engine.engine import Engine


class EngineReading:
    """A core Reading. capacity: tokens to keep room for. A trunk that cannot continue reads one token at a time after its first pass."""

    def __init__(self, engine: Engine, capacity: int) -> None:
        self._engine, self._capacity = engine, capacity
        self._tokens: list[int] = []
        self._state = engine.trunk.start(1, capacity)

    def read(self, tokens: Sequence[int], *, every: bool = False) -> np.ndarray:
        """Raises InputError for a token that is none."""
        engine, new_1T = self._engine, np.asarray(tokens, np.int64)[None]
        if not new_1T.size or new_1T.min() < 0 or new_1T.max() >= engine.facts.vocabulary:
            raise InputError(
                "a text has no token, or one that the model does not know",
                expected=f"0 to {engine.facts.vocabulary - 1}",
                fix="use this model's tokenizer",
            )
        width = new_1T.shape[1]
        if self._tokens and not engine.trunk.continues:
            pieces = [slice(at, at + 1) for at in range(width)]
        else:
            pieces = engine.pieces(width, 1)
        rows = [engine.follow(new_1T[:, piece], self._state, every=every) for piece in pieces]
        self._tokens += new_1T[0].tolist()
        return np.concatenate(rows) if every else rows[-1]

    def back(self, length: int) -> None:
        kept = self._tokens[:length]
        if length >= len(self._tokens):
            return
        if kept and self._engine.trunk.back(self._state, length):
            self._tokens = kept
            return
        self._tokens, self._state = [], self._engine.trunk.start(1, self._capacity)
        if kept:
            self.read(kept)
