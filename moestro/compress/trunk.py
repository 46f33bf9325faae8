"""Which matrices beside the experts are encoded: all that products are made with, and none that choose experts or normalise."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import NamedTuple

from moestro.core.plans.compression import CompressionPlan
from moestro.kernels.packed import TILE
from moestro.models.checkpoint import Checkpoint
from moestro.models.families.resize import is_router
from moestro.models.layout import Layout
from moestro.models.native import describe, native_supported
from moestro.models.native.weights import matrices

FLOATS = ("F32", "F16", "BF16")


class TrunkMatrices(NamedTuple):
    """outer: embedding and head, as many of them as the file has. inner: the others that are encoded.

    left: matrices that no kernel takes in tiles. unloaded: those that the model does not load, such as layers for multi-token
    prediction. Both stay as they are stored, and so do `kept`: routers, and what no product is made with.
    """

    outer: tuple[str, ...]
    inner: tuple[str, ...]
    left: tuple[str, ...]
    unloaded: tuple[str, ...]
    kept: tuple[str, ...]


def trunk_matrices(checkpoint: Checkpoint, layout: Layout) -> TrunkMatrices:
    """Of a model on disk. Reads no weight.

    A family with a native trunk says which matrices its kernels take; of others all are taken but routers. A matrix whose rows the
    kernels cut at another place than between tiles is left.
    """
    two, unloaded = (
        [n for n in names if len(checkpoint.ref(n).shape) >= 2 and checkpoint.ref(n).dtype in FLOATS]
        for names in (layout.trunk, layout.ignored)
    )
    two = [n for n in two if len(checkpoint.ref(n).shape) == 2]
    kept = {n for n in two if is_router(n) or not n.endswith(".weight") or checkpoint.ref(n).shape[0] == 1}
    if native_supported(checkpoint, layout) is None:
        decoder = describe(checkpoint, layout)
        cut = {n: pieces for n, pieces in matrices(decoder).items() if n in checkpoint.tensors}
        chosen = [n for n in two if n in cut and (cut[n] == 1 or checkpoint.ref(n).shape[0] // cut[n] % TILE == 0)]
        ends = {decoder.embedding, decoder.head}
    else:
        chosen = [n for n in two if n not in kept]
        ends = {n for n in chosen if "embed_tokens" in n or n.endswith("lm_head.weight")}
    outer = tuple(n for n in chosen if n in ends)
    rest = [n for n in two if n not in chosen]
    return TrunkMatrices(
        outer,
        tuple(n for n in chosen if n not in ends),
        tuple(n for n in rest if n not in kept),
        tuple(unloaded),
        tuple(n for n in rest if n in kept),
    )


def plain_matrices(found: TrunkMatrices, plan: CompressionPlan) -> tuple[str, ...]:
    """The matrices that could have few bits and stay as they are stored by this plan."""
    there = [n for n in found.unloaded if not any(fnmatch(n, pattern) for pattern in plan.dropped)]
    return tuple(n for n in (*found.inner, *found.outer, *found.left, *there) if n not in plan.tensors)


def told(plain: tuple[str, ...], found: TrunkMatrices, flags: str) -> str:
    """What a person has to know of them, and what to do. flags: those that give the matrices of the trunk a codec."""
    odd = sum(n in found.left for n in plain), sum(n in found.unloaded for n in plain)
    why = [f"{odd[0]} that the kernels take in no tiles"] if odd[0] else []
    why += [f"{odd[1]} that the model does not load (leave them out: --drop)"] if odd[1] else []
    text = f"{len(plain)} matrices stay as they are stored, such as {plain[0]}" + (
        f"; {', '.join(why)} among them" if why else ""
    )
    return f"{text}; {f'give {flags}, or ' if len(plain) > sum(odd) else ''}allow it: --allow-plain"
