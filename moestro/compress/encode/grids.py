"""The values that a codec can hold, group by group: fitting a group's range, rounding to its levels, and laying the codes into tiles.

Shapes: R rows, C columns, G weights that share a scale, N = any number of groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.kernels.ffn import Matrix
from moestro.kernels.packed import Packed, assemble, pack
from moestro.models.codecs.encode import Codec, parse_codec

SHRINKS = tuple(1 - i / 32 for i in range(21))  # tried sizes of a group's range
_ZERO_STEPS = 64  # kernels.packed keeps the zero of 'nested' in 64ths of its scale
_AT_ONCE = 1 << 18  # weights in one piece of `Grid.fit`, so that temporaries stay in the cache


class Range(NamedTuple):
    """What a group's levels are made of: value = scale (step u + base) + offset for the code u."""

    scale_N: np.ndarray
    offset_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Grid:
    """The levels of one codec: codes 0..levels-1, each `step` scales from the next, the first at `base` scales.

    kind: 'even' (symmetric, the scale is positive), 'signed' (the scale takes the sign of the largest weight), 'minimum' (an
    offset of its own, float16) or 'zero' (an offset in 64ths of the scale, at most 0).
    """

    codec: Codec
    levels: int
    step: float
    base: float
    kind: str

    @property
    def group(self) -> int:
        return self.codec.group

    def fit(self, w_NG: np.ndarray, weight_NG: np.ndarray | None = None) -> Range:
        """The range of least squared error for each group among shrunken ones; weight_NG says how much each error counts.

        Raises CheckpointError when a scale is beyond float16.
        """
        size = max(1, _AT_ONCE // w_NG.shape[1])
        pieces = []
        for at in range(0, len(w_NG), size):
            some = slice(at, at + size)
            weight = None if weight_NG is None else np.broadcast_to(weight_NG, w_NG.shape)[some]
            pieces.append(self._fit(w_NG[some], weight))
        found = Range(*(np.concatenate(parts) for parts in zip(*pieces, strict=True)))
        if not (np.isfinite(found.scale_N).all() and np.isfinite(found.offset_N).all()):
            raise CheckpointError(
                f"these weights are too large for the float16 scales of {self.codec.name}", fix="keep them as stored"
            )
        return found

    @np.errstate(invalid="ignore", over="ignore")  # of scales beyond float16, which `fit` reports
    def _fit(self, w_NG: np.ndarray, weight_NG: np.ndarray | None) -> Range:
        best_N = np.full(len(w_NG), np.inf, np.float32)
        chosen = Range(np.zeros(len(w_NG), np.float32), np.zeros(len(w_NG), np.float32))
        for shrink in SHRINKS:
            tried = self._range(w_NG, shrink)
            away_NG = w_NG - self.values(self.codes(w_NG, tried), tried)
            away_NG *= away_NG
            error_N = (away_NG if weight_NG is None else away_NG * weight_NG).sum(-1)
            better_N = ~(error_N >= best_N)  # a range that is not finite is kept, and reported by `fit`
            best_N = np.where(better_N, error_N, best_N)
            chosen = Range(*(np.where(better_N, new, old) for new, old in zip(tried, chosen, strict=True)))
        return chosen

    def _range(self, w_NG: np.ndarray, shrink: float) -> Range:
        low_N, high_N = w_NG.min(-1), w_NG.max(-1)
        none_N = np.zeros(len(w_NG), np.float32)
        if self.kind == "even":
            return Range(_half(shrink * np.maximum(high_N, -low_N) / -self.base), none_N)
        if self.kind == "signed":
            return Range(_half(shrink * np.where(high_N > -low_N, high_N, low_N) / self.base), none_N)
        if self.kind == "zero":
            low_N, high_N = np.minimum(low_N, 0), np.maximum(high_N, 0)
        middle_N, width_N = (low_N + high_N) / 2, shrink * (high_N - low_N)
        scale_N = _half(width_N / ((self.levels - 1) * self.step))
        return Range(scale_N, self.offset(middle_N - width_N / 2 - self.base * scale_N, scale_N))

    def offset(self, wanted_N: np.ndarray, scale_N: np.ndarray) -> np.ndarray:
        """The nearest offset that the codec can hold."""
        if self.kind == "minimum":
            return _half(wanted_N)
        if self.kind != "zero":
            return np.zeros_like(wanted_N)
        zero_N = np.clip(np.rint(-_ZERO_STEPS * wanted_N / np.where(scale_N == 0, np.float32(1), scale_N)), 0, 255)
        return (-zero_N * scale_N / _ZERO_STEPS).astype(np.float32)

    def codes(self, w_NG: np.ndarray, range_: Range) -> np.ndarray:
        """The nearest level of each weight: whole numbers 0..levels-1, as float32."""
        unit_N = range_.scale_N * np.float32(self.step)
        unit_N = np.where(unit_N == 0, np.float32(1), unit_N)
        first_N = range_.scale_N * np.float32(self.base) + range_.offset_N
        u_NG = (w_NG - first_N[:, None]) / unit_N[:, None]
        np.rint(u_NG, out=u_NG)
        return np.clip(u_NG, 0, self.levels - 1, out=u_NG)

    def values(self, u_NG: np.ndarray, range_: Range) -> np.ndarray:
        """The weights that codes stand for, float32."""
        first_N = range_.scale_N * np.float32(self.base) + range_.offset_N
        return u_NG * (range_.scale_N * np.float32(self.step))[:, None] + first_N[:, None]

    def lay(self, u_RC: np.ndarray, range_: Range) -> Packed:
        """Tiles of codes [R, C]; the range's arrays are [R, C / G], or flat in that order."""
        rows, cols = u_RC.shape
        format, group = self.codec.format, self.group
        u_RC = u_RC.astype(np.uint8)
        scale_RB = range_.scale_N.reshape(rows, cols // group).astype(np.float16)
        if format == "int8":
            return pack(Matrix((u_RC.astype(np.int16) - 127).astype(np.int8), "int8", scale_RB, group))
        if format == "int4":
            return pack(Matrix(u_RC[:, 0::2] | u_RC[:, 1::2] << 4, "int4", scale_RB, group))
        offset_RB = range_.offset_N.reshape(scale_RB.shape)
        if format == "uint4":
            return assemble(u_RC, format, group, scale_RB, offset_RB.astype(np.float16))
        if format != "nested":
            return assemble(u_RC, format, group, scale_RB)
        exact_RB = scale_RB.astype(np.float32)
        zero_RB = np.rint(-_ZERO_STEPS * offset_RB / np.where(exact_RB == 0, 1, exact_RB)).astype(np.uint8)
        extra = self.codec.planes - 2
        halves = [(u_RC >> (extra - 1 - i) & 1, (exact_RB * 0.5 ** (i + 2)).astype(np.float16)) for i in range(extra)]
        nothing = [(np.zeros_like(u_RC), np.zeros_like(scale_RB))] * (2 - extra)
        whole = assemble(u_RC >> extra, format, group, scale_RB, zero_RB, [*halves, *nothing])
        return replace(whole, parts=whole.parts[: 1 + extra])


def grid_of(codec: str | Codec) -> Grid:
    """The levels of a codec by its name. 'nested:G/2', '/3' and '/4' are even levels with a zero of their own.

    Raises InputError for an unknown codec, CheckpointError for one without even levels.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    known = {
        "int8": (255, 1.0, -127.0, "even"),
        "int4": (16, 1.0, -8.0, "signed"),
        "int3": (8, 2.0, -7.0, "even"),
        "int2": (4, 2.0, -3.0, "even"),
        "uint4": (16, 1.0, 0.0, "minimum"),
    }
    if codec.format == "nested":  # a plane adds +-1/4 of the scale, the next +-1/8: the levels stay even
        extra = codec.planes - 2
        return Grid(codec, 4 << extra, 0.5**extra, -0.5 + 0.5 ** (extra + 1), "zero")
    if codec.format not in known:
        raise CheckpointError(
            f"{codec.name} has no even levels to fit", expected="int8, int4, int3, int2, uint4 or nested", fix="use encode.rtn"
        )
    return Grid(codec, *known[codec.format])


def by_groups(w_RC: np.ndarray, group: int) -> np.ndarray:
    """[R * C / G, G] of [R, C]."""
    return w_RC.reshape(-1, group)


def _half(values_N: np.ndarray) -> np.ndarray:
    """Rounded to float16; what is beyond its range becomes infinite."""
    with np.errstate(over="ignore"):
        return values_N.astype(np.float16).astype(np.float32)
