"""Keys and values of one sequence, in room reserved at once; pages that were never written cost nothing.

A layer with a window keeps only what later tokens can see. Positions move to the front of its room by multiples of SPAN, at
which attention begins its sums, so that what was dropped changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moestro.kernels.attention import SPAN
from moestro.kernels.put import put
from moestro.kernels.reader import aligned

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class Room(NamedTuple):
    """What one layer keeps per token: `heads` keys of `keys` numbers and values of `values`; 0 values: they are the keys' first `shared` numbers.

    window: tokens that attention looks back, its own included; 0: all.
    """

    heads: int
    keys: int
    values: int
    shared: int = 0
    window: int = 0


class Held(NamedTuple):
    """keys_SKd, values_SKv: views of positions first .. first + S of the sequence."""

    keys_SKd: np.ndarray
    values_SKv: np.ndarray
    first: int


class SequenceCache:
    """One sequence's keys and values of all layers. length: tokens it holds; `put` writes behind them, `advance` counts them.

    dtype: 'float32', 'float16' or 'bfloat16'. Held [K, S, d] per layer, which attention reads fastest.
    """

    def __init__(self, rooms: Sequence[Room], capacity: int, dtype: str) -> None:
        self.length = 0
        self._dtype = np.dtype(DTYPES[dtype])
        self._layers = [_LayerCache(room, max(1, capacity), self._dtype) for room in rooms]

    def put(self, layer: int, keys_TKd: np.ndarray, values_TKv: np.ndarray | None = None) -> Held:
        """Write float32 keys (and values) behind what is held; all that the new tokens may see."""
        return self._layers[layer].put(self.length, keys_TKd, values_TKv)

    def place(self, layer: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Room for one token more behind what is held: (keys_KSd, values_KSd, position in them). The caller writes it."""
        return self._layers[layer].place(self.length)

    def advance(self, tokens: int) -> None:
        """The tokens that were put in every layer now belong to the sequence."""
        self.length += tokens

    def back(self, length: int) -> bool:
        """Forget what came after the first `length` tokens; False, and nothing is forgotten, where what those see was dropped."""
        if not all(layer.sees(length) for layer in self._layers):
            return False
        self.length = length
        return True

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(layer.nbytes for layer in self._layers)


class _LayerCache:
    """first: position of the sequence that lies at the front of the room; a multiple of SPAN."""

    def __init__(self, room: Room, capacity: int, dtype: np.dtype) -> None:
        self.room, self.first, self._dtype = room, 0, dtype
        self.capacity = min(capacity, self._enough(1)) if room.window else capacity
        self._reserve()

    def _enough(self, tokens: int) -> int:
        """Room for a window before `tokens` new ones, and a SPAN, so that the front moves once in SPAN tokens."""
        return self.room.window + SPAN + tokens

    def _reserve(self) -> None:
        room = self.room
        self._keys = self._array(room.heads, room.keys)
        self._values = self._array(room.heads, room.values) if room.values else None

    def _array(self, heads: int, width: int) -> np.ndarray:
        nbytes = heads * self.capacity * width * self._dtype.itemsize
        return aligned(nbytes).view(self._dtype).reshape(heads, self.capacity, width)

    def place(self, length: int) -> tuple[np.ndarray, np.ndarray, int]:
        if length + 1 - self.first > self.capacity:
            self._make_room(length, 1)
        assert self._values is not None, "values lie in the keys"
        return self._keys, self._values, length - self.first

    def put(self, length: int, keys_TKd: np.ndarray, values_TKv: np.ndarray | None) -> Held:
        if length + len(keys_TKd) - self.first > self.capacity:
            self._make_room(length, len(keys_TKd))
        at = length - self.first
        stop = at + len(keys_TKd)
        put(self._keys, keys_TKd, at)
        keys_SKd = self._keys[:, :stop].transpose(1, 0, 2)
        if self._values is None:
            return Held(keys_SKd, keys_SKd[:, :, : self.room.shared], self.first)
        assert values_TKv is not None
        put(self._values, values_TKv, at)
        return Held(keys_SKd, self._values[:, :stop].transpose(1, 0, 2), self.first)

    def sees(self, length: int) -> bool:
        """Whether all is held that a token at position `length` sees."""
        return self.first <= self._first_seen(length)

    def _first_seen(self, length: int) -> int:
        return max(0, length + 1 - self.room.window) // SPAN * SPAN if self.room.window else 0

    def _make_room(self, length: int, tokens: int) -> None:
        """Drop what no token from position `length` on can see; get more room if that is not enough."""
        seen = self._first_seen(length)
        kept = slice(seen - self.first, length - self.first)
        keys, values, had = self._keys, self._values, self.capacity
        needed = length + tokens - seen
        if needed > had:
            self.capacity = self._enough(tokens) if self.room.window else max(needed, had + had // 2)
            self._reserve()
        for old, new in ((keys, self._keys), (values, self._values)):
            if old is not None and new is not None:
                new[:, : kept.stop - kept.start] = old[:, kept]
        self.first = seen

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + (0 if self._values is None else self._values.nbytes)
