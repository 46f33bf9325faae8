"""Trunk tensors in memory: as they are stored, quantised while they are read from the checkpoint, or from a packed trunk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.kernels.convert import to_f32
from moestro.kernels.ffn import Matrix
from moestro.kernels.packed import Packed
from moestro.kernels.reader import aligned
from moestro.models.checkpoint import NUMPY, Checkpoint, check_finite
from moestro.models.codecs.coded import is_coded, read_coded, rows_in
from moestro.models.codecs.encode import Codec
from moestro.models.codecs.trunk import PackedTrunk, encode_rows, encoded_bytes, same_bytes
from moestro.models.native.decoder import Attention, Decoder, Linear

FORMATS = {"float32": "f32", "float16": "f16", "uint16": "bf16"}


def matrices(decoder: Decoder) -> dict[str, int]:
    """The tensors that a trunk codec quantises, and into how many matrices of equal rows each is cut: attention, MLPs, embedding, head.

    Norms, biases and routers stay as they are stored, and so does what latent attention expands keys and values with.
    """
    out = {decoder.embedding: 1, decoder.head: 1}
    for layer in decoder.layers:
        at = layer.attention
        maps = (at.q, at.k, at.v, at.o) if isinstance(at, Attention) else (at.q, at.q_a, at.kv_a, at.o)
        out |= {one.weight: 1 for one in maps if one is not None}
        if (mlp := layer.mlp) is not None:
            out |= {mlp.gate.weight: 1 if mlp.up else 2, mlp.down.weight: 1}
            out |= {mlp.up.weight: 1} if mlp.up else {}
    return out


def twin(checkpoint: Checkpoint, decoder: Decoder) -> str:
    """The name of an output layer that is the embedding once more, or ''. Raises CheckpointError."""
    if decoder.head == decoder.embedding or not decoder.tied or not same_bytes(checkpoint, decoder.embedding, decoder.head):
        return ""
    return decoder.head


def trunk_bytes(checkpoint: Checkpoint, names: Iterable[str], decoder: Decoder, codec: Codec) -> int:
    """Bytes of these tensors in a quantised trunk. Raises InputError when the codec does not fit."""
    coded = matrices(decoder)
    refs = [checkpoint.ref(name) for name in names]
    return sum(encoded_bytes(ref.name, ref.shape, coded[ref.name], codec) if ref.name in coded else ref.nbytes for ref in refs)


class Weights:
    """Tensors by name, each read once. nbytes: of all that were read and kept.

    coded: the matrices to quantise; see `matrices`. codec: how, None to keep them as stored. packed: where they lie quantised already.

    Every method raises CheckpointError when the file cannot be read or holds a NaN or an infinity.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        coded: Mapping[str, int] | None = None,
        codec: Codec | None = None,
        packed: PackedTrunk | None = None,
    ) -> None:
        self.checkpoint, self.coded, self.codec, self.packed = checkpoint, coded or {}, codec, packed
        self.nbytes = 0 if packed is None else packed.nbytes
        self.read: set[str] = set()

    def _once(self, name: str) -> None:
        if name in self.read:
            raise CheckpointError(f"{name} is used twice", expected="each weight in one place")
        self.read.add(name)

    def array(self, name: str) -> np.ndarray:
        """The tensor as stored (BF16 as uint16)."""
        self._once(name)
        if self.packed is not None:
            return self.packed.array(name)
        ref = self.checkpoint.ref(name)
        out = aligned(ref.nbytes).view(NUMPY[ref.dtype]).reshape(ref.shape)
        self.checkpoint.read_into(name, out)
        check_finite(out, name)
        self.nbytes += out.nbytes
        return out

    def vector(self, name: str) -> np.ndarray | None:
        """float32, or None without a name."""
        if not name:
            return None
        stored = self.array(name)
        out = np.array(to_f32(stored), np.float32)
        self.nbytes += out.nbytes - (stored.nbytes if self.packed is None else 0)
        return out

    def required(self, name: str) -> np.ndarray:
        """As `vector`, of a tensor that has a name."""
        found = self.vector(name)
        assert found is not None
        return found

    def matrix(self, name: str) -> Matrix | Packed:
        """In the format it is stored in, or quantised."""
        return self.pieces(name, 1)[0]

    def pieces(self, name: str, count: int) -> list[Matrix | Packed]:
        """A matrix cut into `count` of equal rows."""
        if self.packed is None and is_coded((ref := self.checkpoint.ref(name)).dtype):
            self._once(name)
            whole = read_coded(self.checkpoint, name, aligned(ref.nbytes))
            self.nbytes += ref.nbytes
            rows = whole.rows // count
            return [whole] if count == 1 else [rows_in(whole, i * rows, rows) for i in range(count)]
        if self.codec is None or name not in self.coded:
            array = self.array(name)
            rows = len(array) // count
            return [wrap(array[i * rows : (i + 1) * rows]) for i in range(count)]
        assert self.coded[name] == count, f"{name} is cut into {self.coded[name]} pieces"
        self._once(name)
        if self.packed is not None:
            return [self.packed.tiles(name, i) for i in range(count)]
        rows = self.checkpoint.ref(name).shape[0] // count
        made = [encode_rows(self.checkpoint, name, self.codec, i * rows, rows) for i in range(count)]
        self.nbytes += sum(one.nbytes for one in made)
        return list(made)

    def linear(self, linear: Linear) -> tuple[Matrix | Packed, np.ndarray | None]:
        """(matrix, float32 bias or None)."""
        return self.matrix(linear.weight), self.vector(linear.bias)

    def outer(self, decoder: Decoder) -> tuple[Matrix | Packed, Matrix | Packed]:
        """Embedding and output layer: one copy where they are one weight."""
        embedding = self.matrix(decoder.embedding)
        if decoder.head == decoder.embedding:
            return embedding, embedding
        missing = self.packed is not None and not self.packed.holds(decoder.head)
        if missing or (self.packed is None and twin(self.checkpoint, decoder)):
            self._once(decoder.head)
            return embedding, embedding
        return embedding, self.matrix(decoder.head)


def embed(embedding: Matrix | Packed, token_N: np.ndarray, out_ND: np.ndarray) -> np.ndarray:
    """The tokens' rows in float32."""
    if isinstance(embedding, Packed):
        return embedding.take(token_N, out_ND)
    return to_f32(embedding.data[token_N], out_ND)


def wrap(array: np.ndarray) -> Matrix:
    """A stored array as the kernels take it."""
    return Matrix(array, FORMATS[array.dtype.name])
