"""Which matrices of a trunk are encoded: all that products are made with, and none that choose experts or normalise."""

from __future__ import annotations

from typing import NamedTuple

from moestro.kernels.packed import TILE
from moestro.models.checkpoint import Checkpoint
from moestro.models.families.resize import router_tensors
from moestro.models.layout import Layout
from moestro.models.native import describe, native_supported
from moestro.models.native.weights import matrices

FLOATS = ("F32", "F16", "BF16")


class TrunkMatrices(NamedTuple):
    """outer: embedding and head, as many of them as the file has. inner: the others. left: matrices that stay as they are stored."""

    outer: tuple[str, ...]
    inner: tuple[str, ...]
    left: tuple[str, ...]


def trunk_matrices(checkpoint: Checkpoint, layout: Layout) -> TrunkMatrices:
    """Of a model on disk. Reads no weight.

    A family with a native trunk says which matrices its kernels take; of others all are taken but routers. A matrix whose rows the
    kernels cut at another place than between tiles is left.
    """
    two = [n for n in layout.trunk if len(checkpoint.ref(n).shape) == 2 and checkpoint.ref(n).dtype in FLOATS]
    if native_supported(checkpoint, layout) is None:
        decoder = describe(checkpoint, layout)
        cut = {n: pieces for n, pieces in matrices(decoder).items() if n in checkpoint.tensors}
        chosen = [n for n in two if n in cut and (cut[n] == 1 or checkpoint.ref(n).shape[0] // cut[n] % TILE == 0)]
        ends = {decoder.embedding, decoder.head}
    else:
        routers = {n for la in layout.facts.layers for n in router_tensors(checkpoint, layout, la.ordinal)}
        chosen = [n for n in two if n not in routers and n.endswith(".weight")]
        ends = {n for n in chosen if "embed_tokens" in n or n.endswith("lm_head.weight")}
    outer = tuple(n for n in chosen if n in ends)
    return TrunkMatrices(outer, tuple(n for n in chosen if n not in ends), tuple(n for n in two if n not in chosen))
