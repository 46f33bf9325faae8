"""The record of a packed store: one expert as one aligned, contiguous run of bytes, so that a single direct read brings it in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moestro.core.experts import ExpertSpec
from moestro.kernels.ffn import ExpertView, Matrix
from moestro.kernels.packed import Packed, part_sizes
from moestro.models.codecs.encode import PLANES, Codec, check_expert

BLOCK = 4096  # what direct reads need offsets, lengths and addresses to be multiples of
_LINE = 64  # every field starts on a cache line
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16", "mxfp4": "uint8"}


class Field(NamedTuple):
    """One array inside a record. matrix: 'gate', 'up' or 'down'. what: 'data', 'scales', 'bias', or the number of a packed part."""

    matrix: str
    what: str | int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """Geometry of the records of one layer's experts. Biases are float32.

    sizes: bytes from the record's start that hold it, each a multiple of 4096. One number, or for a nested codec those that
    hold 2, 3 and 4 bits: first the 2-bit parts of all matrices and the biases, then their third bits, then their fourth.
    """

    codec: Codec
    spec: ExpertSpec
    fields: tuple[Field, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the whole record."""
        return self.sizes[-1]

    @classmethod
    def of(cls, spec: ExpertSpec, codec: Codec) -> Record:
        """The record of experts of this shape. codec: a concrete one (see `parse_codec`). Raises InputError when it does not fit."""
        check_expert(codec, spec)
        shapes = _shapes(spec)
        biases = [(name, "bias", "float32", (rows,)) for name, (rows, _) in shapes.items()] if spec.bias else []
        wanted: list[list[tuple[str, str | int, str, tuple[int, ...]]]]
        if codec.tiled:
            parts = {name: part_sizes(*shape, codec.format, codec.group) for name, shape in shapes.items()}
            planes = len(parts["up"])
            wanted = [[(name, i, "uint8", (sizes[i],)) for name, sizes in parts.items()] for i in range(planes)]
        else:
            wanted = [[]]
            for name, (rows, cols) in shapes.items():
                width = cols // 2 if codec.format == "mxfp4" else cols
                wanted[0].append((name, "data", _DTYPES[codec.format], (rows, width)))
                if codec.group:
                    wanted[0].append((name, "scales", "uint8", (rows, cols // codec.group)))
        wanted[0] += biases
        fields, sizes, at = [], [], 0
        for plane in wanted:
            for name, what, dtype, shape in plane:
                nbytes = math.prod(shape) * np.dtype(dtype).itemsize
                fields.append(Field(name, what, at, nbytes, dtype, shape))
                at += -(-nbytes // _LINE) * _LINE
            at = -(-at // BLOCK) * BLOCK
            sizes.append(at)
        return cls(codec, spec, tuple(fields), tuple(sizes))

    def size(self, planes: int = 0) -> int:
        """Bytes to read for this many bits of a nested codec; 0 for the whole record."""
        return self.sizes[PLANES.index(planes)] if planes else self.nbytes

    def write(self, expert: ExpertView, out: np.ndarray) -> None:
        """Fill `out` (uint8 [nbytes]) with an expert in this record's format; the gaps are zeroed."""
        assert out.dtype == np.uint8 and out.shape == (self.nbytes,)
        out[...] = 0
        for field in self.fields:
            matrix = getattr(expert, field.matrix)
            if field.what == "bias":
                array = getattr(expert, field.matrix + "_bias")
            else:
                found = matrix.format, matrix.group, isinstance(matrix, Packed)
                assert found == self.codec[:3], f"{field.matrix} is {found}, the record {self.codec}"
                array = matrix.parts[field.what] if isinstance(field.what, int) else getattr(matrix, field.what)
            # An expert without this bias where its layer has one would be another function: a programmer's error.
            assert array is not None and array.shape == field.shape, f"{field.matrix} {field.what} does not fit the record"
            self._array(field, out)[...] = array

    def view(self, buffer: np.ndarray, planes: int = 0) -> ExpertView:
        """The expert in `buffer` (uint8, contiguous), without copying: it is valid while the buffer holds it.

        planes: bits of a nested codec that are there and used; 0 for all. The buffer holds at least `size(planes)` bytes.
        """
        limit = self.size(planes)
        arrays = {(f.matrix, f.what): self._array(f, buffer) for f in self.fields if f.offset < limit}
        matrices = {name: self._matrix(name, shape, arrays) for name, shape in _shapes(self.spec).items()}
        biases = (arrays.get((name, "bias")) for name in ("gate", "up", "down"))
        return ExpertView(matrices.get("gate"), matrices["up"], matrices["down"], *biases)

    def _matrix(self, name: str, shape: tuple[int, int], arrays: dict[tuple[str, str | int], np.ndarray]) -> Matrix | Packed:
        codec = self.codec
        if not codec.tiled:
            return Matrix(arrays[name, "data"], codec.format, arrays.get((name, "scales")), codec.group)
        parts = tuple(arrays[name, i] for i in range(len(self.sizes)) if (name, i) in arrays)
        return Packed(parts, codec.format, codec.group, *shape)

    @staticmethod
    def _array(field: Field, buffer: np.ndarray) -> np.ndarray:
        return buffer[field.offset : field.offset + field.nbytes].view(field.dtype).reshape(field.shape)


def _shapes(spec: ExpertSpec) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix."""
    inner = dict.fromkeys(("gate", "up") if spec.gated else ("up",), (spec.d_expert, spec.d_model))
    return inner | {"down": (spec.d_model, spec.d_expert)}
