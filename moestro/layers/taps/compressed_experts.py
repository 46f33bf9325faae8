"""Compressed experts: the lighter half of a token's experts do not run; three learned vectors of each change how the others do.

Paper      He et al. 2025, arXiv 2503.00634
Idea       What the lighter experts add is a small correction, and scaling the heavier ones' inputs and neurons can carry it.
Rule       main: the `main` heaviest slots; aux: the others, with shares a_j = p_j / sum over aux of p; c = sum_j a_j CE[id_j];
           out_e = down((act(gate(h c1)) * up(h c3)) c2) for each main expert, times its own weight; the weights of aux are lost
Needs      the vectors, trained by train.tuning.compressed_experts
Gives      a routing of the main experts, and c1_TD, c2_TF, c3_TD; torch or numpy, as it comes
Departs    nothing; c2 is as wide as an expert (the authors cut a longer vector). A token without aux experts has c = 1
Checked    CE = 1 is the main experts alone, bit for bit in float32; the order of aux slots does not matter; T * main experts run
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import Array, Routing, namespace
from moestro.layers.taps.first import rank

NAMES = ("gate_ED", "hidden_EF", "up_ED")  # CE1, CE2, CE3


class Scales(NamedTuple):
    """What multiplies, for each token, the input of an expert's gate, its neurons, and the input of its up projection."""

    gate_TD: Array
    hidden_TF: Array
    up_TD: Array


class CompressedExperts:
    """The tap. arrays: by NAMES."""

    point = "experts"

    def __init__(self, arrays: Mapping[str, Array], main: int) -> None:
        if main < 1:
            raise InputError(f"{main} main experts", expected="at least 1")
        self.arrays, self.main = arrays, main

    def split(self, routing: Routing) -> tuple[Routing, Scales]:
        """The main experts, and how they are scaled."""
        xp = namespace(routing.weights_TK)
        rank_TK = rank(routing)
        aux_TK = (rank_TK >= self.main) & (routing.experts_TK >= 0)
        share_TK = xp.where(aux_TK, routing.weights_TK, xp.zeros_like(routing.weights_TK))
        total_T1 = share_TK.sum(-1)[:, None]
        share_TK = share_TK / (total_T1 + 1e-20)
        rest_T1 = 1 - share_TK.sum(-1)[:, None]  # 1 for a token without aux, or whose aux weigh nothing
        made = []
        for name in NAMES:
            vectors_EC = self.arrays[name]
            vectors_EC = vectors_EC if namespace(vectors_EC) is xp else xp.asarray(vectors_EC)
            c_TC = rest_T1 * xp.ones_like(vectors_EC[:1])
            for place in range(self.main, routing.slots):
                here_TK = rank_TK == place
                id_T = (routing.experts_TK * here_TK).sum(-1) * (share_TK * here_TK > 0).any(-1)
                c_TC = c_TC + (share_TK * here_TK).sum(-1)[:, None] * vectors_EC[id_T]
            made.append(c_TC)
        return routing.drop(aux_TK, renormalise=False), Scales(*made)


@method("layers.taps.compressed_experts", kind="learned tap", fidelity="exact", paper="2503.00634")
def compressed_experts(arrays: Mapping[str, Array], *, main: int = 1) -> CompressedExperts:
    """arrays: what was trained. Raises InputError."""
    return CompressedExperts(arrays, main)
