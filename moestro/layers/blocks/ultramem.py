"""UltraMemV2: a dense feed-forward layer and beside it a memory of rows, of which each token reads a few.

Paper      Huang et al. 2025, arXiv 2508.18756
Idea       n^2 addresses found through two sides of n keys; what a token reads does not grow with n, and all layers read one ring of rows.
Rule       q = LN(W_q x) in two halves; S1_ia = q1 . K1_ia, S2_ja = q2 . K2_ja (K layer-normed, rank r); G_c = S1 C_c S2^T for two cores
           u, v: the first singular vectors of C_1 + C_2; the M best rows by S1 u and columns by S2 v; of their M^2 cells the M largest
           G = G_1 + G_2; row = (perm(i n + j) mod R + offset_l) mod total; o = W_out sum (P_row . W_pre x) w_c V_row, half c of V with w_c = G_c
           y = FFN(x) + o
Needs      dense width, activation and gated of the configuration for the FFN; experts, num_experts and top_k are not read
Gives      a block; its routing names the n rows of the first side, weighted by the absolute score read through each
Departs    R = n^2 rows are seen by a layer, of total = n^2 / share; layers begin at even distances in the ring. The sign of u, v is the one
           that makes their sum's products with the last step's positive; evaluation uses the saved one. The router's names are a summary
Checked    M = n is the best of all n^2 cells; reads M rows whatever n is; layers with one offset read the same tensor
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.experts import Shared, down_std, spec_at
from moestro.layers.site import Site, require
from moestro.layers.stages import where


class Ring(nn.Module):
    """The rows that all layers read: pre_RP meets the input, value_RV is what is read."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__()
        self.pre_RP = nn.Parameter(torch.randn(rows, width) * std)
        self.value_RV = nn.Parameter(torch.randn(rows, width) * std)


class Memory(nn.Module):
    """Keys, cores and maps of one layer. keys [2, n, r, W]; cores [2, r, r]; width is that of half a query, of P and of V."""

    permutation: Tensor
    last_2r: Tensor

    def __init__(self, site: Site, ring: Ring, n: int, k: int, width: int, rank: int) -> None:
        super().__init__()
        require(n >= 1 and width >= 2 and width % 2 == 0, f"n {n}, width {width}", "n of 1, an even width of 2 or more")
        require(1 <= k <= n, f"{k} rows of n {n}", f"1 to {n}")
        require(rank >= 1, f"rank {rank}", "at least 1")
        self.n, self.k, self.width, self.ring = n, k, width, ring
        self.offset = site.layer * len(ring.value_RV) // max(1, site.layers)
        self.query = nn.Linear(site.d_model, 2 * width, bias=False)
        self.query_norm = nn.LayerNorm(2 * width)
        self.keys = nn.Parameter(torch.randn(2, n, rank, width) * width**-0.5)
        self.key_norm = nn.Parameter(torch.full((width,), width**-0.4))
        self.cores = nn.Parameter(torch.rand(2, rank, rank))
        self.pre = nn.Linear(site.d_model, width, bias=False)
        self.out = nn.Linear(width, site.d_model, bias=False)
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.pre.weight, std=site.d_model**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5)
        rng = torch.Generator().manual_seed(site.layer)
        self.register_buffer("permutation", torch.randperm(n * n, generator=rng))
        self.register_buffer("last_2r", torch.ones(2, rank))

    def scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """s1_Tnr, s2_Tnr."""
        q = self.query_norm(self.query(x_TD)).unflatten(-1, (2, self.width))
        keys = functional.layer_norm(self.keys, (self.width,)) * self.key_norm
        s1, s2 = torch.einsum("tsw,snrw->stnr", q, keys)
        return s1, s2

    @torch.no_grad()
    def directions(self, training: bool) -> tuple[Tensor, Tensor]:
        """u_r, v_r, with the sign that they had."""
        u, _, vh = torch.linalg.svd(self.cores.sum(0))
        pair = torch.stack((u[:, 0], vh[0]))
        pair = torch.where((pair * self.last_2r).sum() < 0, -pair, pair)
        if training:
            self.last_2r.copy_(pair)
        return pair[0], pair[1]

    def find(self, x_TD: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """address_TM: i * n + j of the cells with the largest sum of scores; weight_TM2: their scores by both cores."""
        s1, s2 = self.scores(x_TD)
        u, v = self.directions(training)
        rows = (s1.detach() @ u).topk(self.k, -1).indices
        columns = (s2.detach() @ v).topk(self.k, -1).indices
        rank = s1.shape[-1]
        s1 = s1.gather(1, rows[..., None].expand(-1, -1, rank))
        s2 = s2.gather(1, columns[..., None].expand(-1, -1, rank))
        grid = torch.einsum("tia,cab,tjb->tijc", s1, self.cores, s2).flatten(1, 2)
        cell = grid.detach().sum(-1).topk(self.k, -1).indices
        address = rows.gather(1, cell // self.k) * self.n + columns.gather(1, cell % self.k)
        return address, grid.gather(1, cell[..., None].expand(-1, -1, 2))

    def forward(self, x_TD: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """o_TD, and what was read: address_TM, weight_TM2."""
        address, weight = self.find(x_TD, training)
        row = (self.permutation[address] + self.offset) % len(self.ring.value_RV)
        match = (functional.embedding(row, self.ring.pre_RP) * self.pre(x_TD)[:, None]).sum(-1)
        value = functional.embedding(row, self.ring.value_RV).unflatten(-1, (2, -1))
        read = torch.einsum("tm,tmc,tmcv->tcv", match, weight, value).flatten(1)
        return self.out(read), address, weight


class UltraMem(nn.Module):
    """The feed-forward layer and the memory."""

    def __init__(self, dense: nn.Module, memory: Memory) -> None:
        super().__init__()
        self.dense, self.memory = dense, memory

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        o_TD, address, weight = self.memory(x_TD, ctx.training)
        mass = x_TD.new_zeros(len(x_TD), self.memory.n, dtype=torch.float32)
        mass = mass.scatter_add(1, address // self.memory.n, weight.detach().float().abs().sum(-1))
        experts = where(mass > 0, mass)
        weights = mass.gather(1, experts.clamp_min(0)).masked_fill(experts < 0, 0.0)
        return BlockOutput(self.dense(x_TD) + o_TD.to(x_TD.dtype), (Routing(experts, weights, mass, mass),))


@method("layers.blocks.ultramem", kind="block", fidelity="faithful", paper="2508.18756")
def ultramem(site: Site, *, n: int = 32, rows: int = 8, width: int = 32, rank: int = 2, share: float = 0.5) -> UltraMem:
    """n: keys per side. rows: M, read per token. width: of keys, pre-values and values. share: of the ring that a layer sees."""
    c = site.config
    require(0 < share <= 1, f"share {share}", "above 0, at most 1")
    ring: Ring = site.shared("ultramem", lambda: Ring(math.ceil(n * n / share), width, 0.02))
    dense = Shared(spec_at(site, c.dense_width if c else site.d_expert), std=site.init_std, down_std=down_std(site))
    return UltraMem(dense, Memory(site, ring, n, rows, width, rank))
