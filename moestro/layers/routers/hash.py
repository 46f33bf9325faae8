"""Hash layers: the expert is a fixed function of the token id.

Paper      Roller et al. 2021, arXiv 2106.04426
Idea       Nothing to learn and nothing to balance: a table from ids to experts, made before training.
Rule       e_t = h[id_t], weight exactly 1; h 'random' (uniform) or 'balanced' (ids by falling frequency, each to the expert with
           the least frequency so far)
           hashes m > 1: the experts are m blocks, slot j is a hash into block j; with experts 1/m as wide this is the paper's MultiHash
           bigrams: h is indexed by a hash of the previous and the current id in the sequence, into `buckets`
Needs      token ids
Gives      a router without parameters; the table is a saved buffer
Departs    bigrams are an addition, for vocabularies of bytes. 'balanced' without frequencies takes all ids as equally frequent.
           Trait gradient: no gradient reaches a table
Checked    a pure function of the id; loads of a balanced table; blocks; a banned expert leaves its slot empty
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax

_FACTOR = 1_000_003


class Lookup(nn.Module):
    """logits_TE: 0 at the experts of the token's id, -inf elsewhere. table_XJ: expert of each id and hash."""

    table_XJ: Tensor

    def __init__(self, table_XJ: Tensor, num_experts: int, vocabulary: int, bigrams: bool) -> None:
        super().__init__()
        self.num_experts, self.vocabulary, self.bigrams = num_experts, vocabulary, bigrams
        self.register_buffer("table_XJ", table_XJ)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        rows_TJ = self.table_XJ[self._key(ctx)]
        never = x_TD.new_full((x_TD.shape[0], self.num_experts), float("-inf"))
        return never.scatter(1, rows_TJ, 0.0)

    def _key(self, ctx: RouteContext) -> Tensor:
        require(ctx.token_ids_T is not None, "a hash router without token ids", "token ids in the context")
        ids_T = torch.as_tensor(ctx.token_ids_T)
        if not self.bigrams:
            return ids_T
        before_T = ids_T.roll(1)
        starts_T = torch.ones_like(ids_T, dtype=torch.bool)
        if ctx.sequence_T is None:
            starts_T[1:] = False
        else:
            starts_T[1:] = ctx.sequence_T[1:] != ctx.sequence_T[:-1]
        before_T = before_T.masked_fill(starts_T, self.vocabulary)
        return (before_T * _FACTOR + ids_T) % self.table_XJ.shape[0]


def table(rows: int, experts: int, kind: str, seed: int, frequencies: Sequence[float] = ()) -> Tensor:
    """experts_X: one expert for each of `rows` ids."""
    g = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randint(experts, (rows,), generator=g)
    # Ids of one frequency, and experts of one load, come in random order.
    order = torch.randperm(rows, generator=g)
    weight = torch.as_tensor(frequencies, dtype=torch.float64) if len(frequencies) else torch.ones(rows, dtype=torch.float64)
    order = order[weight[order].argsort(descending=True, stable=True)]
    names = torch.randperm(experts, generator=g).tolist()
    heap = [(0.0, place) for place in range(experts)]
    found = torch.empty(rows, dtype=torch.int64)
    for row in order.tolist():
        load, place = heapq.heappop(heap)
        found[row] = names[place]
        heapq.heappush(heap, (load + float(weight[row]), place))
    return found


@method("layers.routers.hash", kind="router", fidelity="faithful", paper="2106.04426", traits=("gradient",))
def hash_router(
    site: Site,
    *,
    kind: str = "balanced",
    frequencies: Sequence[float] = (),
    hashes: int = 1,
    per_layer: bool = False,
    bigrams: bool = False,
    buckets: int = 16384,
    seed: int = 0,
) -> StagedRouter:
    """kind: 'balanced' or 'random'. frequencies: how often each id (or bucket) occurs in the corpus. per_layer: each its own table."""
    rows = buckets if bigrams else site.vocabulary
    require(kind in ("balanced", "random"), f"kind {kind!r}", "balanced or random")
    require(rows >= 1, f"a table of {rows} rows", "at least 1")
    require(hashes >= 1 and site.num_experts % hashes == 0, f"{hashes} hashes of {site.num_experts} experts", "a divisor")
    require(len(frequencies) in (0, rows), f"{len(frequencies)} frequencies", f"one for each of {rows} ids")
    require(all(f >= 0 for f in frequencies), "a negative frequency", "0 or more")
    block = site.num_experts // hashes
    first = seed + (site.layer * hashes if per_layer else 0)
    columns = [table(rows, block, kind, first + j, frequencies) + j * block for j in range(hashes)]
    return StagedRouter(
        score=Lookup(torch.stack(columns, 1), site.num_experts, site.vocabulary, bigrams),
        normalise=softmax,
        select=TopK(hashes),
        combine=Combine("constant"),
    )
