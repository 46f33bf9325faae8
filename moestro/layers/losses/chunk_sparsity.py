"""Chunk sparsity: neighbouring tokens should need few experts together.

Paper      Song et al. 2025, BlockFFN, arXiv 2507.08771
Idea       When several tokens are computed at once, each expert that any of them needs must be read. Charge that union.
Rule       p = n_te / (sum_e n_te + 1e-5), n: the router's scores, none negative; for chunks of L neighbouring tokens of a sequence
           loss = weight (1 - mean over chunks and experts of exp(sum over the chunk's tokens of ln(1 - p_te + 1e-5))), averaged over the layers
Needs      probs that are not negative
Gives      a scalar: the mean probability that an expert is used in a chunk; leaves nothing behind
Departs    nothing. A shorter last chunk counts as it is; without sequences all tokens are one. The mean over the layers is our reading
Checked    L = 1: the mean of p; written out over chunks; one-hot scores: the share of experts that a chunk uses
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require


class ChunkSparsity(nn.Module):
    """See the file's header."""

    def __init__(self, site: Site, weight: Scheduled, length: int) -> None:
        super().__init__()
        require(length >= 1, f"chunks of {length} tokens", "at least 1")
        self.weight, self.length, self.layers = read(weight), length, site.layers

    def forward(self, decision: Decision) -> Tensor:
        n_TE = decision.probs_TE
        p_TE = n_TE / (n_TE.sum(-1, keepdim=True) + 1e-5)
        chunk_T, chunks = chunks_of(decision.ctx, len(n_TE), self.length)
        unused_CE = p_TE.new_zeros(chunks, p_TE.shape[1]).index_add(0, chunk_T, (1 - p_TE + 1e-5).log()).exp()
        return value_at(self.weight, decision.ctx.step) / self.layers * (1 - unused_CE.mean())


def chunks_of(ctx: RouteContext, tokens: int, length: int) -> tuple[Tensor, int]:
    """(chunk_T, how many): `length` neighbours of one sequence each, counted from its first token in the batch."""
    place_T = torch.arange(tokens)
    row_T = torch.zeros_like(place_T)
    if ctx.sequence_T is not None:
        row_T, count_B = torch.as_tensor(ctx.sequence_T).unique_consecutive(return_inverse=True, return_counts=True)[1:]
        place_T = place_T - (count_B.cumsum(0) - count_B)[row_T]
    found, chunk_T = (row_T * (tokens + 1) + place_T // length).unique(return_inverse=True)
    return chunk_T, len(found)


@method("layers.losses.chunk_sparsity", kind="loss", fidelity="faithful", paper="2507.08771")
def chunk_sparsity(site: Site, *, weight: Scheduled = 0.05, length: int = 64) -> ChunkSparsity:
    """length: L, of a chunk in tokens. The objective `adaptive` moves the weight as training goes."""
    return ChunkSparsity(site, weight, length)
