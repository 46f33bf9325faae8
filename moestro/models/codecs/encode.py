"""Turning an expert into another number format, by the codec's name: 'stored', 'f32', 'f16', 'bf16', 'int8:G', 'int4:G', 'mxfp4'."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.core.errors import CheckpointError, InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.kernels.convert import to_bf16
from moestro.kernels.ffn import GROUPS, ExpertView, Matrix
from moestro.kernels.quantise import encode_int4, encode_int8, encode_mxfp4

CODECS = ("stored", "f32", "f16", "bf16", *(f"{kind}:{g}" for kind in ("int8", "int4") for g in GROUPS), "mxfp4")
SCALES = "float16"  # of int8 and int4; half the bytes of float32, and far finer than the weights beside them


class Codec(NamedTuple):
    """A number format and, for int8, int4 and mxfp4, how many weights share a scale (0 otherwise)."""

    format: str
    group: int

    @property
    def name(self) -> str:
        return f"{self.format}:{self.group}" if self.format in ("int8", "int4") else self.format


def parse_codec(name: str, stored: str = "stored") -> Codec:
    """A codec from its name; 'stored' means the format `stored`. `int8:g64` is read as `int8:64`. Raises InputError."""
    name = name.replace(":g", ":")
    if name not in CODECS:
        raise InputError(f"unknown codec {name!r}", expected=f"one of {', '.join(CODECS)}")
    kind, _, group = (stored if name == "stored" else name).partition(":")
    return Codec(kind, int(group) if group else 32 if kind == "mxfp4" else 0)


def is_exact(codec: Codec, stored: str) -> bool:
    """Whether weights stored as `stored` survive the codec without any change."""
    return codec.format == stored or codec.format == "f32"


def check_fit(codec: Codec, spec: ExpertSpec) -> None:
    """Raises InputError when the expert's rows do not divide into the codec's groups."""
    for width in (spec.d_model, spec.d_expert):
        if codec.group and width % codec.group:
            fitting = [g for g in GROUPS if spec.d_model % g == 0 and spec.d_expert % g == 0]
            raise InputError(
                f"{codec.name} needs rows in multiples of {codec.group}, these experts have rows of {width}",
                expected=f"a group of {' or '.join(map(str, fitting))}" if fitting else "bf16, f16 or f32",
                fix=f"use {codec.format}:{fitting[-1]}" if fitting and codec.format != "mxfp4" else "use the codec 'stored'",
            )


def encode(expert: ExpertView | ExpertWeights, codec: Codec) -> ExpertView:
    """The expert in the codec's format, integers rounded to nearest; matrices already in it are kept as they are.

    Raises CheckpointError for weights that the format cannot hold (not finite, or beyond float16's range).
    """
    if isinstance(expert, ExpertWeights):
        gate = None if expert.gate_FD is None else _float(expert.gate_FD)
        expert = ExpertView(gate, _float(expert.up_FD), _float(expert.down_DF), expert.gate_F, expert.up_F, expert.down_D)
    gate = None if expert.gate is None else _encode(expert.gate, codec)
    return ExpertView(
        gate, _encode(expert.up, codec), _encode(expert.down, codec), expert.gate_bias, expert.up_bias, expert.down_bias
    )


def _float(array: np.ndarray) -> Matrix:
    return Matrix(np.ascontiguousarray(array, np.float32), "f32")


def _encode(matrix: Matrix, codec: Codec) -> Matrix:
    if matrix.format == codec.format and (codec.format not in ("int8", "int4") or matrix.group == codec.group):
        return matrix
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
        if codec.format == "mxfp4":
            return encode_mxfp4(values)
        return (encode_int8 if codec.format == "int8" else encode_int4)(values, codec.group, scale_dtype=SCALES)
    except ValueError as error:
        raise CheckpointError(f"an expert cannot be stored as {codec.name}: {error}", fix="use the codec 'stored'") from error
