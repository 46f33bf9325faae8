"""The record of a packed store: one expert as one aligned, contiguous run of bytes, so that a single direct read brings it in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moestro.core.experts import ExpertSpec
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.models.codecs.encode import SCALES, Codec, check_fit

BLOCK = 4096  # what direct reads need offsets, lengths and addresses to be multiples of
_LINE = 64  # every field starts on a cache line
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16", "int8": "int8", "int4": "uint8", "mxfp4": "uint8"}


class Field(NamedTuple):
    """One array inside a record. name: 'gate', 'up' or 'down', alone or with '_scales' or '_bias'."""

    name: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Geometry of the records of one layer's experts. nbytes: a multiple of 4096. Biases are float32."""

    codec: Codec
    fields: tuple[Field, ...]
    nbytes: int

    @classmethod
    def of(cls, spec: ExpertSpec, codec: Codec) -> Record:
        """The record of experts of this shape. codec: a concrete one (see `parse_codec`). Raises InputError when it does not fit."""
        check_fit(codec, spec)
        d, f = spec.d_model, spec.d_expert
        rows = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        if not spec.gated:
            del rows["gate"]
        wanted: list[tuple[str, str, tuple[int, ...]]] = []
        for name, (r, c) in rows.items():
            wanted.append((name, _DTYPES[codec.format], (r, c // 2 if codec.format in ("int4", "mxfp4") else c)))
            if codec.group:
                wanted.append((name + "_scales", "uint8" if codec.format == "mxfp4" else SCALES, (r, c // codec.group)))
        if spec.bias:
            wanted += [(name + "_bias", "float32", (r,)) for name, (r, _) in rows.items()]
        fields, at = [], 0
        for name, dtype, shape in wanted:
            nbytes = math.prod(shape) * np.dtype(dtype).itemsize
            fields.append(Field(name, at, nbytes, dtype, shape))
            at += -(-nbytes // _LINE) * _LINE
        return cls(codec, tuple(fields), -(-at // BLOCK) * BLOCK)

    def write(self, expert: ExpertView, out: np.ndarray) -> None:
        """Fill `out` (uint8 [nbytes]) with an expert in this record's format; the gaps are zeroed."""
        assert out.dtype == np.uint8 and out.shape == (self.nbytes,)
        out[...] = 0
        for field in self.fields:
            name, _, what = field.name.partition("_")
            matrix = getattr(expert, name)
            if what == "bias":
                array = getattr(expert, field.name)
            else:
                assert (matrix.format, matrix.group) == self.codec, f"{name} is {matrix.format}, the record {self.codec.name}"
                array = matrix.scales if what else matrix.data
            # An expert without this bias where its layer has one would be another function: a programmer's error.
            assert array is not None and array.shape == field.shape, f"{field.name} does not fit the record"
            self._array(field, out)[...] = array

    def view(self, buffer: np.ndarray) -> ExpertView:
        """The expert in `buffer` (uint8, at least nbytes, contiguous), without copying: it is valid while the buffer holds it."""
        arrays = {field.name: self._array(field, buffer) for field in self.fields}
        matrices = {
            name: Matrix(arrays[name], self.codec.format, arrays.get(name + "_scales"), self.codec.group)
            for name in ("gate", "up", "down")
            if name in arrays
        }
        biases = (arrays.get(name + "_bias") for name in ("gate", "up", "down"))
        return ExpertView(matrices.get("gate"), matrices["up"], matrices["down"], *biases)

    @staticmethod
    def _array(field: Field, buffer: np.ndarray) -> np.ndarray:
        return buffer[field.offset : field.offset + field.nbytes].view(field.dtype).reshape(field.shape)
