"""Accumulators whose result does not depend on the order in which things are added: counts, exact sums, maxima.

A float sum depends on its order, so shards merged in another order would give another profile. `Sum` therefore rounds each added
number to a fixed grid first; multiples of the grid add without any rounding, in any order, until the range is used up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np

from moestro.core.errors import InputError, ProfileError

Index = Any  # whatever numpy takes between brackets; no position may occur twice


class Statistic(Protocol):
    """An array that grows by `add` and joins another of its kind by `merge`; both in any order."""

    @property
    def nbytes(self) -> int: ...

    def add(self, at: Index, values: Any) -> None: ...

    def merge(self, other: Self) -> None: ...

    def value(self) -> np.ndarray:
        """What has been added so far."""
        ...

    def parts(self) -> dict[str, np.ndarray]:
        """Everything that has to be kept to go on later."""
        ...

    def restore(self, parts: Mapping[str, np.ndarray]) -> None: ...


class Count:
    """Whole numbers, int64 unless told otherwise. dtype: a narrower integer where the most that can be counted is known."""

    def __init__(self, *shape: int, dtype: Any = np.int64) -> None:
        self.array = np.zeros(shape, dtype)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def add(self, at: Index, values: Any) -> None:
        self.array[at] += np.asarray(values).astype(self.array.dtype)

    def merge(self, other: Self) -> None:
        self.array += other.array

    def value(self) -> np.ndarray:
        return self.array

    def parts(self) -> dict[str, np.ndarray]:
        return {"": self.array}

    def restore(self, parts: Mapping[str, np.ndarray]) -> None:
        self.array = np.array(parts[""])


class Sum:
    """Real numbers: each added one is rounded to a multiple of 2**-34 and the sum is exact from there on.

    Two float64 limbs: multiples of 1/4 up to 2**51, and what is left, up to 2**22 additions to one position. Both add exactly.

    Raises:
        InputError: from `value`, when the sum has left that range or something was not a finite number.
    """

    COARSE, FINE, MOST = 0.25, 2.0**-34, 2.0**51

    def __init__(self, *shape: int) -> None:
        self.high, self.low = np.zeros(shape), np.zeros(shape)

    @property
    def nbytes(self) -> int:
        return self.high.nbytes + self.low.nbytes

    def add(self, at: Index, values: Any) -> None:
        # One number needs no arrays, which took half of the time of small models' probes.
        if isinstance(values, float) and math.isfinite(values):
            coarse = round(values / self.COARSE) * self.COARSE
            self.high[at] += coarse
            self.low[at] += round((values - coarse) / self.FINE) * self.FINE
            return
        values = np.asarray(values, np.float64)
        high = np.rint(values / self.COARSE) * self.COARSE
        self.high[at] += high
        with np.errstate(invalid="ignore"):  # of what is not finite; `value` refuses it
            self.low[at] += np.rint((values - high) / self.FINE) * self.FINE

    def merge(self, other: Self) -> None:
        self.high += other.high
        self.low += other.low

    def value(self) -> np.ndarray:
        if not (np.abs(self.high) < self.MOST).all():
            raise InputError(
                "a statistic has grown beyond what can be summed exactly, or the model computed something that is not a number",
                expected=f"sums below {self.MOST:.0e}",
                fix="profile less text, or look for infinite weights in the model",
            )
        return self.high + self.low

    def parts(self) -> dict[str, np.ndarray]:
        return {".high": self.high, ".low": self.low}

    def restore(self, parts: Mapping[str, np.ndarray]) -> None:
        self.high, self.low = np.array(parts[".high"]), np.array(parts[".low"])


class Most:
    """The largest number seen at each place, float32; 0 where none was (what is kept here is never negative)."""

    def __init__(self, *shape: int) -> None:
        self.array = np.zeros(shape, np.float32)

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def add(self, at: Index, values: Any) -> None:
        self.array[at] = np.maximum(self.array[at], values)

    def merge(self, other: Self) -> None:
        np.maximum(self.array, other.array, out=self.array)

    def value(self) -> np.ndarray:
        return self.array

    def parts(self) -> dict[str, np.ndarray]:
        return {"": self.array}

    def restore(self, parts: Mapping[str, np.ndarray]) -> None:
        self.array = np.array(parts[""])


class Same:
    """An array that is known before the run and the same in every shard."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def add(self, at: Index, values: Any) -> None:
        raise AssertionError("what is known before the run does not grow")

    def merge(self, other: Self) -> None:
        assert np.array_equal(self.array, other.array), "shards of one run know the same"

    def value(self) -> np.ndarray:
        return self.array

    def parts(self) -> dict[str, np.ndarray]:
        return {"": self.array}

    def restore(self, parts: Mapping[str, np.ndarray]) -> None:
        if not np.array_equal(self.array, parts[""]):
            raise ProfileError("what was saved is of other data", fix="remove it and start again")
