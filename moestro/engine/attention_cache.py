"""Keys and values of one sequence, in room reserved at once; pages that were never written cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moestro.kernels.convert import to_bf16
from moestro.kernels.reader import aligned

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class Room(NamedTuple):
    """What one layer keeps per token: `heads` keys of `keys` numbers and values of `values`; 0 values: they are the keys' first `shared` numbers."""

    heads: int
    keys: int
    values: int
    shared: int = 0


class SequenceCache:
    """One sequence's keys and values of all layers. length: tokens it holds; `put` writes behind them, `advance` counts them.

    dtype: 'float32', 'float16' or 'bfloat16'. Held [K, S, d] per layer, which attention reads fastest.
    """

    def __init__(self, rooms: Sequence[Room], capacity: int, dtype: str) -> None:
        self.length = 0
        self.rooms, self.capacity = tuple(rooms), max(1, capacity)
        self._dtype = np.dtype(DTYPES[dtype])
        self._keys = [self._reserve(room.heads, self.capacity, room.keys) for room in self.rooms]
        self._values = [self._reserve(room.heads, self.capacity, room.values) if room.values else None for room in self.rooms]

    def _reserve(self, heads: int, tokens: int, width: int) -> np.ndarray:
        room = aligned(heads * tokens * width * self._dtype.itemsize)
        return room.view(self._dtype).reshape(heads, tokens, width)

    def put(self, layer: int, keys_TKd: np.ndarray, values_TKv: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Write float32 keys (and values) behind what is held; (keys_SKd, values_SKv) of all tokens, as views."""
        stop = self.length + len(keys_TKd)
        if stop > self.capacity:
            self._grow(max(stop, self.capacity + self.capacity // 2))
        keys, values = self._keys[layer], self._values[layer]
        self._write(keys, keys_TKd, stop)
        if values is None:
            shared = keys[:, :stop, : self.rooms[layer].shared]
            return keys[:, :stop].transpose(1, 0, 2), shared.transpose(1, 0, 2)
        assert values_TKv is not None
        self._write(values, values_TKv, stop)
        return keys[:, :stop].transpose(1, 0, 2), values[:, :stop].transpose(1, 0, 2)

    def _write(self, room_KSd: np.ndarray, new_TKd: np.ndarray, stop: int) -> None:
        if self._dtype == np.uint16:
            new_TKd = to_bf16(new_TKd)
        room_KSd[:, self.length : stop] = new_TKd.transpose(1, 0, 2)

    def advance(self, tokens: int) -> None:
        """The tokens that were put in every layer now belong to the sequence."""
        self.length += tokens

    def _grow(self, capacity: int) -> None:
        for held in (self._keys, self._values):
            for layer, old in enumerate(held):
                if old is not None:
                    new = self._reserve(old.shape[0], capacity, old.shape[2])
                    new[:, : self.capacity] = old
                    held[layer] = new
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(a.nbytes for a in (*self._keys, *self._values) if a is not None)
