"""Weights in few bits, laid out in tiles of 16 output rows that stream through memory once, for activations rounded to int8.

Layout     Rows are padded to tiles of 16. A tile is a run of units, one per group of inputs: the 16 scales (float16; mxfp4: 8-bit
           exponents; the base of nested also 16 zeros of 8 bits, uint4 16 minimums of 16), then 32 inputs x 16 rows at a time, as
           words of 32 bits: first the words of all 16 rows, then the next words. A word holds 4 inputs of one row, one per byte
           (int8); 8, the later 4 in the high nibbles (int4, uint4, mxfp4); 16 (int2); or 32 single bits (the third bit of int3, the
           planes of nested).
Values     int8: v s.   int4: (u - 8) s.   uint4: u s + m.   int3: (2 u - 7) s.   int2: (2 u - 3) s.
           mxfp4: E2M1 value times 2^(e - 127).
           nested: W2 = (u - z / 64) s, and every further plane W_k = W_(k-1) + (+-1) s_k (arXiv 2504.15299).
Products   A row of activations is rounded once, per 32 inputs, to int8 with scale max |x| / 127. Each 32 products are summed as whole
           numbers; then one multiply-add per plane with (weight scale x activation scale), block after block; the minimums of
           uint4 are a plane of ones. So a row's bits do not depend on its company or on threads, and numpy, scalar and vector code
           agree bit for bit.
Error      of a gated FFN (silu, width 512, normal data) by rounding the activations alone: 0.9 % of its root mean square.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moestro.kernels import native
from moestro.kernels.convert import to_f32
from moestro.kernels.ffn import MXFP4_VALUES, Matrix
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4, encode_uint4
from moestro.kernels.reader import HUGE, aligned

FORMATS = ("int8", "int4", "int3", "int2", "mxfp4", "nested", "uint4")
GROUPS = (32, 64, 128)
TILE = 16  # output rows
BLOCK = 32  # inputs that share an activation scale
_BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2, "mxfp4": 4, "nested": 2, "uint4": 4}
_ZEROS = {"int4": 8, "int3": 7, "int2": 3}
_ZERO_STEPS = 64  # a zero of nested is a whole number of 64ths
_KINDS = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(np.uint16): "bf16"}
_NOT_FINITE = "cannot quantise weights that hold infinities or not-a-number"
_TOO_LARGE = "these weights are too large for float16 scales"
_FIRST = 7  # the native code counts packed formats on from those of Matrix
_SHRINKS = tuple(np.float32(1) - np.float32(i) / np.float32(16) for i in range(11))  # tried sizes of a group's range


def part_sizes(rows: int, cols: int, format: str, group: int) -> tuple[int, ...]:
    """Bytes of each part of a packed matrix: one, or for 'nested' the base of two bits, the third plane and the fourth.

    Raises:
        ValueError: an unknown format, or a group that does not fit it or does not divide the row.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown packed format {format!r}; expected one of {', '.join(FORMATS)}")
    allowed = (32,) if format == "mxfp4" else GROUPS
    if group not in allowed or cols % group or rows < 0 or cols < 0:
        raise ValueError(
            f"cannot pack {rows} x {cols} as {format} in groups of {group}; expected a group of {allowed} that divides the row"
        )
    units = -(-rows // TILE) * (cols // group)
    head = {"mxfp4": 1, "nested": 3, "uint4": 4}.get(format, 2) * TILE
    sizes = (units * (head + TILE * group * _BITS[format] // 8),)
    return sizes if format != "nested" else (*sizes, *(2 * (units * (2 * TILE + TILE * group // 8),)))


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One weight matrix [rows, cols] in tiles; stands wherever a `Matrix` does, but not beside one in the same call.

    parts: contiguous uint8 arrays of `part_sizes` bytes at any address (multiples of 64 are fastest). Of 'nested' the first one, two or
    three parts are a matrix of 2, 3 or 4 planes.

    Raises:
        ValueError: parts that do not fit the shape.
    """

    parts: tuple[np.ndarray, ...]
    format: str
    group: int
    rows: int
    cols: int
    handle: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        sizes = part_sizes(self.rows, self.cols, self.format, self.group)
        found = [(p.dtype.name, p.shape) for p in self.parts]
        if not self.parts or found != [("uint8", (size,)) for size in sizes[: len(self.parts)]]:
            raise ValueError(f"{self.format} {self.shape} in groups of {self.group} has parts of {sizes} bytes, found {found}")
        if any(not p.flags.c_contiguous for p in self.parts):
            raise ValueError("the parts of a packed matrix must be contiguous")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def planes(self) -> int:
        """Bits of the codes: 2, 3 or 4 for 'nested', by the number of parts."""
        return _BITS[self.format] + len(self.parts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: codes, scales and the padding of rows to 16."""
        return sum(p.nbytes for p in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.rows * self.cols)

    @property
    def finite(self) -> bool:
        """Whether all scales and minimums are numbers; codes always are."""
        if self.format == "mxfp4":
            return not (_units(self, 0)[:, :, :TILE] == 255).any()
        width = 4 * TILE if self.format == "uint4" else 2 * TILE  # minimums follow the scales
        heads = (np.ascontiguousarray(_units(self, part)[:, :, :width]).view(np.float16) for part in range(len(self.parts)))
        return all(bool(np.isfinite(head).all()) for head in heads)

    def dequantise(self) -> np.ndarray:
        """float32 [rows, cols]: the planes' values added in order."""
        total: np.ndarray | None = None
        with np.errstate(over="ignore", invalid="ignore"):
            for whole_RC, scale_RB in _planes(self):
                plane = whole_RC.astype(np.float32) * np.repeat(scale_RB, BLOCK, axis=1)
                total = plane if total is None else total + plane
        assert total is not None
        return total

    def take(self, ids_N: np.ndarray, out_NC: np.ndarray) -> np.ndarray:
        """out_NC: float32 rows of `dequantise` by number, int64. Raises IndexError when there is no such row."""
        module = native.extension()
        if module is not None:
            module.unpack_rows(self.handle or self.bind(module), ids_N, out_NC)
            return out_NC
        if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < self.rows:
            raise IndexError(f"row {ids_N.max()} of {self.rows}")
        tiles, back_N = np.unique(ids_N // TILE, return_inverse=True)
        parts = tuple(np.ascontiguousarray(part.reshape(-(-self.rows // TILE), -1)[tiles]).reshape(-1) for part in self.parts)
        values = Packed(parts, self.format, self.group, len(tiles) * TILE, self.cols).dequantise()
        return np.take(values, back_N * TILE + ids_N % TILE, axis=0, out=out_NC)

    def reference(self) -> Callable[[np.ndarray], np.ndarray]:
        """The product with one row of activations, float32 [cols] -> [rows], in numpy: the bits of the native code."""
        planes = [(whole.reshape(self.rows, -1, BLOCK), scale) for whole, scale in _planes(self)]

        def product(x_C: np.ndarray) -> np.ndarray:
            (codes_BI,), (scale_B,) = round_activations(x_C[None])
            sums = np.zeros(self.rows, np.float32)
            dots = [np.einsum("rbi,bi->rb", whole, codes_BI.astype(np.int32)).astype(np.float32) for whole, _ in planes]
            for b in range(len(scale_B)):
                for dot, (_, scale_RB) in zip(dots, planes):
                    sums = _fma(dot[:, b], scale_RB[:, b] * scale_B[b], sums)
            return sums

        return product

    def pack(self) -> tuple[int, ...]:
        """Addresses and sizes, as the native code wants them; the same places as `Matrix.pack`."""
        base, third, fourth = (*(p.ctypes.data for p in self.parts), 0, 0)[:3]
        return (_FIRST + FORMATS.index(self.format), base, 0, self.rows, self.cols, third, fourth, 1, self.group)

    def bind(self, module: Any) -> Any:
        """The native code's view of this matrix, made at the first use and kept as `handle`."""
        object.__setattr__(self, "handle", module.Matrix(self.pack()))
        return self.handle


def pack(matrix: Matrix) -> Packed:
    """The same values in tiles: int8 and int4 with scales that float16 holds, uint4 or mxfp4.

    Raises:
        ValueError: another format, or float32 scales that float16 cannot hold.
    """
    if matrix.format not in ("int8", "int4", "uint4", "mxfp4"):
        raise ValueError(f"cannot pack a {matrix.format} matrix as it is; expected int8, int4, uint4 or mxfp4, or use quantise()")
    assert matrix.scales is not None
    scales = matrix.scales
    if scales.dtype == np.float32:
        with np.errstate(over="ignore"):
            scales = scales.astype(np.float16)
        if not (scales == matrix.scales).all():
            raise ValueError("these float32 scales do not fit float16; encode with scale_dtype='float16'")
    rows, cols = matrix.shape
    made = _empty(rows, cols, matrix.format, matrix.group)
    module = native.extension()
    if module is None:
        codes = matrix.data.view(np.uint8)
        if matrix.format != "int8":
            codes = np.stack([codes & 15, codes >> 4], -1)
        first, second = (scales, None) if scales.ndim == 2 else (scales[..., 0], scales[..., 1])
        _fill(made, codes.reshape(rows, cols), first, second)
    else:
        data, scales = np.ascontiguousarray(matrix.data), np.ascontiguousarray(scales)
        module.pack_tiles(made.pack(), data.ctypes.data, scales.ctypes.data, native.cores())
    return made


def quantise(w_RC: np.ndarray, format: str, group: int = 64) -> Packed:
    """Encode weights: float32, float16 or uint16 (bf16 bits), rows at any stride and alignment. Scales are float16 (mxfp4: exponents).

    int8, int4, uint4, mxfp4: the rules of `kernels.quantise`.
    int3, int2: levels +-1, +-3 ... +-(2^bits - 1) times s; of eleven s, from max |w| / (2^bits - 1) down to 6/16 of it, the one of least
    squared error.
    nested (arXiv 2504.15299): the base has four levels between the group's least and largest weight (zero included), both
    shrunk by the one of the same eleven factors that errs least; each further plane is the sign of what is left, times the mean of
    its size.

    Raises:
        ValueError: as `part_sizes`; weights that are not finite or too large for float16 scales.
    """
    if w_RC.ndim != 2 or w_RC.dtype not in _KINDS:
        raise ValueError(f"cannot quantise an array of {w_RC.dtype} {w_RC.shape}; expected floats [rows, cols]")
    rows, cols = w_RC.shape
    made, module = _empty(rows, cols, format, group), native.extension()
    if module is not None:
        near = w_RC if cols < 2 or w_RC.strides[1] == w_RC.itemsize else np.ascontiguousarray(w_RC)
        fit = module.quantise_tiles(made.pack(), Matrix(near, _KINDS[near.dtype]).pack(), native.cores())
        if fit:
            raise ValueError(_NOT_FINITE if fit == 2 else _TOO_LARGE)
        return made
    w_RC = np.ascontiguousarray(to_f32(w_RC))
    if not np.isfinite(w_RC).all():
        raise ValueError(_NOT_FINITE)
    if format in ("int8", "int4"):
        return pack((encode_int8 if format == "int8" else encode_int4)(w_RC, group, scale_dtype="float16"))
    if format in ("uint4", "mxfp4"):
        return pack(encode_uint4(w_RC, group) if format == "uint4" else encode_mxfp4(w_RC))
    if not reference_quantise(w_RC, made):
        raise ValueError(_TOO_LARGE)
    return made


@np.errstate(over="ignore", invalid="ignore")  # a scale beyond float16 is reported
def reference_quantise(w_RC: np.ndarray, made: Packed) -> bool:
    """Fill `made` (int3, int2 or nested) in numpy: the bytes of the native code. False when a scale is not finite."""
    rows, cols = w_RC.shape
    w = w_RC.reshape(rows, cols // made.group, made.group)
    shape, codes, scale = w.shape[:2], np.zeros(w.shape, np.uint8), np.zeros(w.shape[:2], np.float16)
    zeros, least = np.zeros(shape, np.uint8), np.full(shape, np.inf, np.float32)
    found = np.zeros(w.shape, np.float32)
    nested, top = made.format == "nested", np.float32(2 ** _BITS[made.format] - 1)
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    size = high - low if nested else np.maximum(high, -low)
    for shrink in _SHRINKS:
        half = (shrink * size / top).astype(np.float16)
        s = half.astype(np.float32)
        by = np.where(s == 0, np.float32(1), s)
        if nested:
            z = np.clip(np.rint(np.float32(_ZERO_STEPS) * ((shrink * -low) / by)), 0, 255)
            u = np.clip(np.rint(w / by[..., None] + (z / _ZERO_STEPS)[..., None]), 0, top)
            value = (_ZERO_STEPS * u - z[..., None]) * (s / _ZERO_STEPS)[..., None]
        else:
            z = np.zeros(shape, np.float32)
            u = np.clip(np.rint((w / by[..., None] + top) * np.float32(0.5)), 0, top)
            value = (2 * u - top) * s[..., None]
        error = _sum((w - value) * (w - value))
        better = error < least
        least, scale, zeros = np.where(better, error, least), np.where(better, half, scale), np.where(better, z, zeros)
        codes, found = np.where(better[..., None], u, codes), np.where(better[..., None], value, found)
    good = bool(np.isfinite((size / top).astype(np.float16)).all())
    planes = []
    for _ in made.parts[1:]:
        rest = w - found
        half = (_sum(np.abs(rest)) / np.float32(made.group)).astype(np.float16)
        positive = rest >= 0
        found = found + np.where(positive, half.astype(np.float32)[..., None], -half.astype(np.float32)[..., None])
        planes.append((positive.reshape(rows, cols).astype(np.uint8), half))
        good = good and bool(np.isfinite(half).all())
    if good:
        _fill(made, codes.astype(np.uint8).reshape(rows, cols), scale, zeros.astype(np.uint8) if nested else None, planes)
    return good


def assemble(
    codes_RC: np.ndarray,
    format: str,
    group: int,
    scales_RB: np.ndarray,
    zeros_RB: np.ndarray | None = None,
    planes: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> Packed:
    """Tiles of codes that were chosen elsewhere: int3, int2, uint4 with its minimums, or nested with its zeros and two planes of
    (bits, scales).

    Raises:
        ValueError: as `part_sizes`.
    """
    rows, cols = codes_RC.shape
    made = _empty(rows, cols, format, group)
    _fill(made, codes_RC, scales_RB, zeros_RB, planes)
    return made


def whole_numbers(packed: Packed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every plane whole numbers int32 [rows, cols] and float32 multipliers [rows, cols / 32]; the matrix is the sum of their products.

    int8: v.  int4: u - 8.  int3: 2 u - 7.  int2: 2 u - 3.  uint4: u, then ones with the minimums.  mxfp4: twice the E2M1 value.
    """
    return _planes(packed)


def round_activations(x_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes int8 [T, C / 32, 32], scales float32 [T, C / 32]): scale max |x| / 127 per 32 inputs, rounded to nearest, ties to even.

    Infinities and not-a-number make their block's scale not-a-number, so that they are seen in every output.
    """
    x = np.ascontiguousarray(x_TC, np.float32).reshape(len(x_TC), -1, BLOCK)
    top = np.abs(x).max(-1, initial=0)
    scale = top / np.float32(127)
    usable = np.isfinite(top) & (scale > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.clip(np.rint(x / np.where(usable, scale, np.float32(1))[..., None]), -127, 127)
    codes = np.where(usable[..., None], codes, 0).astype(np.int8)
    return codes, np.where(usable, scale, np.where(np.isfinite(top), np.float32(0), np.float32(np.nan)))


def _sum(values: np.ndarray) -> np.ndarray:
    """float32 sums over the last axis in eight lanes and then pairwise, as the native code adds."""
    lanes = np.zeros((*values.shape[:-1], 8), np.float32)
    for i in range(0, values.shape[-1], 8):
        lanes = lanes + values[..., i : i + 8]
    lanes = lanes[..., :4] + lanes[..., 4:]
    lanes = lanes[..., :2] + lanes[..., 2:]
    return lanes[..., 0] + lanes[..., 1]


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding: exact product, sum rounded to odd in float64, then to float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        product, c = a.astype(np.float64) * b, c.astype(np.float64)
        total = product + c
        from_c = total - product
        lost = (product - (total - from_c)) + (c - from_c)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
        return np.where(inexact, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64).astype(np.float32)


def _empty(rows: int, cols: int, format: str, group: int) -> Packed:
    return Packed(tuple(_room(n) for n in part_sizes(rows, cols, format, group)), format, group, rows, cols)


def _room(nbytes: int) -> np.ndarray:
    if nbytes >= HUGE:
        return aligned(nbytes)
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def _units(packed: Packed, part: int) -> np.ndarray:
    """uint8 [tiles, units, bytes of a unit]."""
    return packed.parts[part].reshape(-(-packed.rows // TILE), packed.cols // packed.group, -1)


def _joined(codes_RC: np.ndarray, bits: int, packed: Packed) -> np.ndarray:
    """Codes of `bits` bits of the padded rows as they lie: uint8 [tiles, units, blocks, bytes]."""
    per = 8 // bits
    x = codes_RC.reshape(-1, TILE, packed.cols // packed.group, packed.group // BLOCK, 8 // per, per, 4)
    shifts = (bits * np.arange(per, dtype=np.uint8)).reshape(-1, 1)
    words = np.bitwise_or.reduce(x << shifts, axis=5).transpose(0, 2, 3, 4, 1, 5)
    return words.reshape(*words.shape[:3], -1)


def _spread(lying: np.ndarray, bits: int, packed: Packed) -> np.ndarray:
    """The inverse of `_joined`, without the padding: uint8 [rows, cols]."""
    per = 8 // bits
    x = lying.reshape(*lying.shape[:3], 8 // per, 1, TILE, 4)
    shifts = (bits * np.arange(per, dtype=np.uint8)).reshape(-1, 1, 1)
    codes = (x >> shifts) & np.uint8(2**bits - 1)
    return codes.transpose(0, 5, 1, 2, 3, 4, 6).reshape(-1, packed.cols)[: packed.rows]


def _fill(
    made: Packed,
    codes_RC: np.ndarray,
    scales_RG: np.ndarray,
    zeros_RG: np.ndarray | None = None,
    planes: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
    """Lay codes [rows, cols], scales and zeros or minimums [rows, groups] and further planes (bits, scales) into the parts of `made`."""
    padding = -made.rows % TILE

    def head(per_group: np.ndarray) -> np.ndarray:
        tiles = np.pad(per_group, ((0, padding), (0, 0))).reshape(-1, TILE, made.cols // made.group).transpose(0, 2, 1)
        return np.ascontiguousarray(tiles).view(np.uint8)

    def body(codes: np.ndarray, bits: int) -> np.ndarray:
        return _joined(np.pad(codes, ((0, padding), (0, 0))), bits, made)

    if made.format == "int3":
        codes = np.concatenate([body(codes_RC & 3, 2), body(codes_RC >> 2, 1)], axis=-1)
    else:
        codes = body(codes_RC, _BITS[made.format])
    flat = codes.reshape(*codes.shape[:2], -1)
    heads = [head(scales_RG), *([] if zeros_RG is None else [head(zeros_RG)])]
    _units(made, 0)[...] = np.concatenate([*heads, flat], axis=-1)
    for part, (bits_RC, scale_RG) in enumerate(planes or (), 1):
        flat = body(bits_RC, 1)
        _units(made, part)[...] = np.concatenate([head(scale_RG), flat.reshape(*flat.shape[:2], -1)], axis=-1)


def _planes(packed: Packed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per plane whole numbers int32 [rows, cols] and float32 multipliers [rows, blocks]; the matrix is the sum of their products."""

    def head(units: np.ndarray, start: int, dtype: str) -> np.ndarray:
        taken = np.ascontiguousarray(units[:, :, start : start + TILE * np.dtype(dtype).itemsize]).view(dtype)
        return taken.transpose(0, 2, 1).reshape(-1, units.shape[1])[: packed.rows]

    def body(units: np.ndarray, start: int) -> np.ndarray:
        return units[:, :, start:].reshape(*units.shape[:2], packed.group // BLOCK, -1)

    def per_block(per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group.astype(np.float32), packed.group // BLOCK, axis=1)

    units, format = _units(packed, 0), packed.format
    if format == "mxfp4":
        codes = _spread(body(units, TILE), 4, packed)
        return [((2 * MXFP4_VALUES).astype(np.int32)[codes], _half_power(head(units, 0, "uint8")))]
    scales = per_block(head(units, 0, "float16"))
    if format == "int8":
        return [(_spread(body(units, 2 * TILE), 8, packed).view(np.int8).astype(np.int32), scales)]
    if format == "int4":
        return [(_spread(body(units, 2 * TILE), 4, packed).astype(np.int32) - _ZEROS["int4"], scales)]
    if format == "uint4":
        codes = _spread(body(units, 4 * TILE), 4, packed).astype(np.int32)
        return [(codes, scales), (np.ones_like(codes), per_block(head(units, 2 * TILE, "float16")))]
    if format == "int2":
        return [(2 * _spread(body(units, 2 * TILE), 2, packed).astype(np.int32) - _ZEROS["int2"], scales)]
    if format == "int3":
        both = body(units, 2 * TILE)
        codes = _spread(both[..., : 8 * TILE], 2, packed) | _spread(both[..., 8 * TILE :], 1, packed) << 2
        return [(2 * codes.astype(np.int32) - _ZEROS["int3"], scales)]
    zeros = np.repeat(head(units, 2 * TILE, "uint8").astype(np.int32), packed.group, axis=1)
    planes = [(_ZERO_STEPS * _spread(body(units, 3 * TILE), 2, packed).astype(np.int32) - zeros, scales / _ZERO_STEPS)]
    for part in range(1, len(packed.parts)):
        units = _units(packed, part)
        bits = _spread(body(units, 2 * TILE), 1, packed).astype(np.int32)
        planes.append((2 * bits - 1, per_block(head(units, 0, "float16"))))
    return planes


def _half_power(exponents: np.ndarray) -> np.ndarray:
    """2^(e - 128) as float32, half of an MXFP4 scale, for its values are doubled to whole numbers; 255 is not-a-number."""
    scales = np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)
    scales[exponents == 255] = np.nan
    return scales
