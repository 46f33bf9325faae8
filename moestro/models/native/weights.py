"""Reads trunk tensors from the checkpoint into memory of their own, as they are stored."""

from __future__ import annotations

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.kernels.convert import to_f32
from moestro.kernels.ffn import Matrix
from moestro.kernels.reader import aligned
from moestro.models.checkpoint import NUMPY, Checkpoint, check_finite
from moestro.models.native.decoder import Linear

FORMATS = {"float32": "f32", "float16": "f16", "uint16": "bf16"}


class Weights:
    """Tensors by name, each read once. nbytes: of all that were read and kept.

    Every method raises CheckpointError when the file cannot be read or holds a NaN or an infinity.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.nbytes = 0
        self.read: set[str] = set()

    def array(self, name: str) -> np.ndarray:
        """The tensor as stored (BF16 as uint16), page-aligned."""
        if name in self.read:
            raise CheckpointError(f"{name} is used twice", expected="each weight in one place")
        ref = self.checkpoint.ref(name)
        out = aligned(ref.nbytes).view(NUMPY[ref.dtype]).reshape(ref.shape)
        self.checkpoint.read_into(name, out)
        check_finite(out, name)
        self.read.add(name)
        self.nbytes += out.nbytes
        return out

    def vector(self, name: str) -> np.ndarray | None:
        """float32, or None without a name."""
        if not name:
            return None
        stored = self.array(name)
        out = np.array(to_f32(stored), np.float32)
        self.nbytes += out.nbytes - stored.nbytes
        return out

    def required(self, name: str) -> np.ndarray:
        """As `vector`, of a tensor that has a name."""
        found = self.vector(name)
        assert found is not None
        return found

    def matrix(self, name: str) -> Matrix:
        """In place, in the format it is stored in."""
        return wrap(self.array(name))

    def linear(self, linear: Linear) -> tuple[Matrix, np.ndarray | None]:
        """(matrix, float32 bias or None)."""
        return self.matrix(linear.weight), self.vector(linear.bias)


def wrap(array: np.ndarray) -> Matrix:
    """A stored array as the kernels take it."""
    return Matrix(array, FORMATS[array.dtype.name])
