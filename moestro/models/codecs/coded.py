"""Checkpoints whose matrices are few-bit tiles: plain safetensors, each coded matrix one run of bytes that runs as it lies.

config.json says which they are: `quantization_config` = {"quant_method": "moestro", "format": 1, "tensors": {codec: {name: [rows, cols]}}}.
Such a tensor is U8 of one dimension: the parts of `kernels.packed.Packed`, each padded to 64 bytes. To readers its dtype is the
codec's name and its shape is the matrix's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import CheckpointError, InputError
from moestro.kernels.packed import TILE, Packed, part_sizes
from moestro.models.codecs.encode import ROUNDED, Codec, check_fit, parse_codec

if TYPE_CHECKING:
    from moestro.models.checkpoint import Checkpoint, TensorRef

METHOD, FORMAT = "moestro", 1
_LINE = 64


def is_coded(dtype: str) -> bool:
    """Whether a tensor's dtype is a codec's name; those of safetensors are in capitals."""
    return not dtype.isupper()


def mark(config: Mapping[str, Any], tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors, coded ones with their codec as dtype and their matrix's shape. Raises CheckpointError."""
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return tensors
    fix = "use the config.json that belongs to the weights"
    try:
        if said["format"] != FORMAT:
            raise CheckpointError(f"coded tensors of format {said['format']}", expected=str(FORMAT), fix="use a newer moestro")
        rows = [(str(name), str(codec), *map(int, shape)) for codec, of in said["tensors"].items() for name, shape in of.items()]
        found = {name: (codec, (r, c)) for name, codec, r, c in rows}
        sizes = {name: sum(_padded(codec, shape)) for name, (codec, shape) in found.items()}
    except (LookupError, TypeError, ValueError, AttributeError, InputError) as error:
        raise CheckpointError(f"config.json does not say how its tensors are coded: {error}", fix=fix) from error
    out = dict(tensors)
    for name, (codec, shape) in found.items():
        ref = tensors.get(name)
        if ref is None or ref.dtype != "U8" or ref.shape != (sizes[name],):
            there = "is not there" if ref is None else f"is {ref.dtype} {list(ref.shape)}"
            raise CheckpointError(f"{name} {there}", expected=f"U8 [{sizes[name]}], {list(shape)} in {codec}", fix=fix)
        out[name] = replace(ref, dtype=codec, shape=shape)
    return out


def changes_said(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a coded checkpoint says of how it differs from the model it was made of; () for plain ones."""
    said = config.get("quantization_config")
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        return ()
    return (*map(str, said.get("changes", ())), ROUNDED)


def describe(coded: Mapping[str, tuple[str, tuple[int, int]]], changes: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of tensors by name: their codec and shape. changes: how the model differs from the original, in words."""
    tensors: dict[str, dict[str, list[int]]] = {}
    for name, (codec, shape) in coded.items():
        tensors.setdefault(codec, {})[name] = list(shape)
    return {"quant_method": METHOD, "format": FORMAT, "changes": list(changes), "tensors": tensors}


def packed_in(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Packed:
    """The matrix in a coded tensor's bytes (uint8, contiguous), without copying."""
    codec, parts, at = parse_codec(dtype), [], 0
    for size, padded in zip(_sizes(codec, shape), _padded(dtype, shape), strict=True):
        parts.append(raw[at : at + size])
        at += padded
    return Packed(tuple(parts), codec.format, codec.group, shape[0], shape[1])


def bytes_of(packed: Packed) -> Iterator[np.ndarray]:
    """A matrix as a coded tensor's bytes."""
    for part in packed.parts:
        yield part
        yield np.zeros(-part.nbytes % _LINE, np.uint8)


def codec_of(packed: Packed) -> Codec:
    """The codec of a matrix, with as many planes as it has."""
    return Codec(packed.format, packed.group, True, packed.planes if packed.format == "nested" else 0)


def coded_bytes(codec: str, shape: tuple[int, ...]) -> int:
    """Of a coded tensor. Raises InputError for an unknown codec, one of plain numbers, or one that does not fit."""
    made = parse_codec(codec)
    if not made.tiled:
        raise InputError(f"{codec} has no tiles of few bits", expected="a codec such as int8:32, uint4:64 or mxfp4")
    check_fit(made, shape[1])
    return sum(_padded(codec, shape))


def read_coded(checkpoint: Checkpoint, name: str, room: np.ndarray | None = None) -> Packed:
    """A coded tensor from disk. room: uint8 of its bytes to read into. Raises CheckpointError, also for scales that are not finite."""
    ref = checkpoint.ref(name)
    raw = np.empty(ref.nbytes, np.uint8) if room is None else room
    checkpoint.read_range(ref.file, ref.offset, raw)
    packed = packed_in(raw, ref.dtype, ref.shape)
    if not packed.finite:
        raise CheckpointError(f"{name} has scales that are not finite", fix="the file is damaged: make or download it again")
    return packed


def rows_in(packed: Packed, first: int, count: int) -> Packed:
    """Some rows of a matrix, without copying; first and count are multiples of 16, or end with the matrix. Raises CheckpointError."""
    if first % TILE or (count % TILE and first + count != packed.rows):
        raise CheckpointError(
            f"rows {first} to {first + count} of a coded matrix cannot be cut out", expected=f"multiples of {TILE}"
        )
    tiles = -(-packed.rows // TILE)
    parts = tuple(p.reshape(tiles, -1)[first // TILE : -(-(first + count) // TILE)].reshape(-1) for p in packed.parts)
    return Packed(parts, packed.format, packed.group, count, packed.cols)


def _sizes(codec: Codec, shape: tuple[int, ...]) -> tuple[int, ...]:
    sizes = part_sizes(shape[0], shape[1], codec.format, codec.group)
    return sizes[: codec.planes - 1] if codec.format == "nested" else sizes


def _padded(name: str, shape: tuple[int, ...]) -> list[int]:
    return [-(-size // _LINE) * _LINE for size in _sizes(parse_codec(name), shape)]
