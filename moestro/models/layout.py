"""Where a model's weights lie on disk: `Part` (one contiguous byte range of an expert) and `Layout` (the whole model)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.models.checkpoint import BITS, TensorRef

ROLES = (
    "gate", "up", "gate_up", "down",
    "gate_bias", "up_bias", "gate_up_bias", "down_bias",
    "gate_scales", "up_scales", "gate_up_scales", "down_scales",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One contiguous byte range that holds one matrix or vector of one expert.

    role: one of ROLES. 'gate_up' holds the gate's rows first, then up's; with `interleaved` even rows are gate, odd rows up.
    '*_scales' go with MXFP4 blocks, whose own part has dtype 'U8'. offset: absolute byte in `file`. shape: as stored; matrices
    are [out, in], or [in, out] when `transposed` (gate_up's gate and up then lie along the columns).
    """

    role: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False
    interleaved: bool = False

    @classmethod
    def of(
        cls, ref: TensorRef, role: str, *, slab: int | None = None, transposed: bool = False, interleaved: bool = False
    ) -> Part:
        """The part that a whole tensor is, or with `slab` its slice [slab] along dimension 0."""
        offset, nbytes, shape = ref.offset, ref.nbytes, ref.shape
        if slab is not None:
            assert 0 <= slab < shape[0], f"{ref.name} has {shape[0]} slabs, not {slab + 1}"
            shape = shape[1:]
            nbytes = math.prod(shape) * BITS[ref.dtype] // 8
            offset += slab * nbytes
        return cls(role, ref.file, offset, nbytes, ref.dtype, shape, transposed, interleaved)


@dataclass(frozen=True, slots=True)
class Layout:
    """A checkpoint's facts and the place of every weight.

    trunk: names on disk of every non-expert tensor that the model loads. ignored: tensors that the model does not load
    (such as MTP layers), listed so that nothing is left out silently. locate: computes an expert's parts.
    """

    facts: ModelFacts
    trunk: tuple[str, ...]
    ignored: tuple[str, ...]
    locate: Callable[[ExpertKey], tuple[Part, ...]]

    def parts(self, key: ExpertKey) -> tuple[Part, ...]:
        """Every byte range of one expert, in a fixed order that is the same for all experts of a layer."""
        return self.locate(key)
