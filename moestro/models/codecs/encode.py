"""Turning an expert into another number format, by the codec's name.

'f32', 'f16' and 'bf16' keep rows of plain numbers; 'int8:G', 'int4:G', 'uint4:G', 'int3:G', 'int2:G', 'mxfp4' and 'nested:G' are
tiles of few-bit weights (kernels.packed), where G weights share a scale (and a minimum in 'uint4') and activations are rounded to 8
bits. 'stored' is what the checkpoint holds, its own bytes and arithmetic. 'nested:G' holds 2 bits inside 3 inside 4; 'nested:G/3' is its first 3 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.core.errors import CheckpointError, InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.kernels.convert import to_bf16
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.packed import GROUPS, Packed, pack, quantise

PLAIN = ("f32", "f16", "bf16")
GROUPED = ("int8", "int4", "uint4", "int3", "int2", "nested")
CODECS = ("stored", *PLAIN, *(f"{kind}:{g}" for kind in GROUPED for g in GROUPS), "mxfp4")
TILED_MXFP4 = "mxfp4:32"  # what a checkpoint holds when it is MXFP4 in tiles; its rows of MXFP4 are 'mxfp4'
PLANES = (2, 3, 4)  # how many bits of a nested weight may be used
ROUNDED = "activations are rounded to 8 bits in groups of 32"


class Codec(NamedTuple):
    """A number format. group: how many weights share a scale (0: none). tiled: few-bit tiles, not rows as a checkpoint stores them.

    planes: of 'nested', how many of its bits are used; 0 for other formats.
    """

    format: str
    group: int = 0
    tiled: bool = False
    planes: int = 0

    @property
    def name(self) -> str:
        """As `parse_codec` reads it; rows of MXFP4 are 'stored'."""
        if self.format == "mxfp4":
            return "mxfp4" if self.tiled else "stored"
        if not self.tiled:
            return self.format
        return f"{self.format}:{self.group}" + (f"/{self.planes}" if self.planes not in (0, PLANES[-1]) else "")


def parse_codec(name: str, stored: str = "stored") -> Codec:
    """A codec from its name; 'stored' means the format `stored`. `int8:g64` is read as `int8:64`. Raises InputError."""
    if name == "stored" and ":" in stored:
        return parse_codec("mxfp4" if stored == TILED_MXFP4 else stored)
    whole, _, planes = name.replace(":g", ":").partition("/")
    if whole not in CODECS or (planes and (not whole.startswith("nested") or planes not in map(str, PLANES))):
        raise InputError(f"unknown codec {name!r}", expected=f"one of {', '.join(CODECS)}")
    if whole == "stored":
        return Codec(stored, 32 if stored == "mxfp4" else 0)
    kind, _, group = whole.partition(":")
    if kind in PLAIN:
        return Codec(kind)
    return Codec(kind, int(group or 32), True, int(planes or PLANES[-1]) if kind == "nested" else 0)


def parse_trunk_codec(name: str) -> Codec | None:
    """How a trunk's matrices are kept: a tiled codec, or None for 'stored'. Raises InputError."""
    if name == "stored":
        return None
    codec = parse_codec(name)
    if not codec.tiled or codec.format == "nested":
        raise InputError(
            f"the trunk cannot be kept as {codec.name}",
            expected=f"stored, mxfp4 or {', '.join(f'{kind}:G' for kind in GROUPED if kind != 'nested')} with G of {', '.join(map(str, GROUPS))}",
        )
    return codec


def keeps_weights(codec: Codec, stored: str) -> bool:
    """Whether weights stored as `stored` survive the codec without any change."""
    return stored in (codec.format, codec.name) or codec.format == "f32" or (codec.name, stored) == ("mxfp4", TILED_MXFP4)


def check_fit(codec: Codec, width: int, what: str = "these experts have rows") -> None:
    """Raises InputError when rows of `width` do not divide into the codec's groups."""
    if codec.group and width % codec.group:
        fitting = [g for g in GROUPS if width % g == 0]
        raise InputError(
            f"{codec.name} needs rows in multiples of {codec.group}, {what} of {width}",
            expected=f"a group of {' or '.join(map(str, fitting))}" if fitting else "bf16, f16 or f32",
            fix=f"use {codec.format}:{fitting[-1]}" if fitting and codec.format != "mxfp4" else "use the codec 'stored'",
        )


def check_expert(codec: Codec, spec: ExpertSpec) -> None:
    """As `check_fit`, for the rows of an expert's matrices."""
    for width in (spec.d_model, spec.d_expert):
        check_fit(codec, width)


def encode(expert: ExpertView | ExpertWeights, codec: Codec) -> ExpertView:
    """The expert in the codec's format, rounded to nearest; matrices already in it are kept as they are.

    Raises CheckpointError for weights that the format cannot hold (not finite, or beyond float16's range).
    """
    if isinstance(expert, ExpertWeights):
        gate = None if expert.gate_FD is None else _float(expert.gate_FD)
        expert = ExpertView(gate, _float(expert.up_FD), _float(expert.down_DF), expert.gate_F, expert.up_F, expert.down_D)
    gate = None if expert.gate is None else encode_matrix(expert.gate, codec)
    up, down = encode_matrix(expert.up, codec), encode_matrix(expert.down, codec)
    return ExpertView(gate, up, down, expert.gate_bias, expert.up_bias, expert.down_bias)


def _float(array: np.ndarray) -> Matrix:
    return Matrix(np.ascontiguousarray(array, np.float32), "f32")


def encode_matrix(matrix: Matrix | Packed, codec: Codec) -> Matrix | Packed:
    """One matrix in the codec's format. A nested one has all its planes, whatever the codec uses of them. Raises CheckpointError."""
    if isinstance(matrix, Packed) == codec.tiled and (matrix.format, matrix.group) == (codec.format, codec.group):
        return matrix
    if codec.tiled and isinstance(matrix, Matrix) and matrix.format == codec.format == "mxfp4":
        return pack(matrix)  # the same values
    values = matrix.dequantise()
    if codec.format == "f32":
        return Matrix(values, "f32")
    if codec.format == "bf16":
        return Matrix(to_bf16(values), "bf16")
    if codec.format == "f16":
        with np.errstate(over="ignore"):  # found right below
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise CheckpointError(
                f"a weight of magnitude {np.abs(values).max():g} does not fit f16",
                expected="at most 65504",
                fix="use bf16 or f32",
            )
        return Matrix(half, "f16")
    try:
        return quantise(values, codec.format, codec.group)
    except ValueError as error:
        raise CheckpointError(f"a matrix cannot be stored as {codec.name}: {error}", fix="use the codec 'stored'") from error
