"""Product-key memory of single-neuron experts: a million tiny experts, a few of them read per token.

Paper      He 2024, PEER, arXiv 2407.04153; keys: Lample et al. 2019, arXiv 1907.05242
Idea       n^2 experts of one neuron each, found by the best n-fold choices on two halves of a query; the cost does not grow with n^2.
Rule       per head: q = W x in two halves; s1 = q1 K1^T, s2 = q2 K2^T; the k best of each half make k^2 candidates (i, j) with score
           s1_i + s2_j; the k best of them, weights softmax; y = sum over heads and chosen (i, j) of g act(u_ij . x) v_ij
Needs      nothing; num_experts and top_k of the configuration are not read
Gives      a block; its routing names the n rows of the first half, weighted by what was chosen of each
Departs    query normalisation is RMSNorm (the paper: batch norm). The routing reported is over halves, as n^2 ids are of no use to plots
Checked    equal to brute force over all n^2 experts; the number of rows read is heads * k per token whatever n is
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.site import Site, require
from moestro.layers.stages import where


class ProductKey(nn.Module):
    """up_ND and down_ND hold the n^2 neurons; keys_HSNW the keys of each head and side."""

    def __init__(self, site: Site, n: int, k: int, heads: int, width: int) -> None:
        super().__init__()
        require(n >= 1 and heads >= 1 and width >= 1, f"n {n}, heads {heads}, width {width}", "at least 1 each")
        require(1 <= k <= n, f"k {k} of n {n} keys", f"1 to {n}")
        self.n, self.k, self.heads, self.width = n, k, heads, width
        self.query = site.linear(heads * 2 * width)
        self.norm = nn.RMSNorm(width)
        self.keys_HSNW = nn.Parameter(torch.randn(heads, 2, n, width) * width**-0.5)
        self.up_ND = nn.Parameter(torch.randn(n * n, site.d_model) * site.d_model**-0.5)
        self.down_ND = nn.Parameter(torch.randn(n * n, site.d_model) * site.init_std)

    def find(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """neuron_THK: ids i * n + j of the best neurons of each head; weight_THK: softmax of their scores."""
        q = self.norm(self.query(x_TD).view(len(x_TD), self.heads, 2, self.width))
        scores = torch.einsum("thsw,hsnw->thsn", q, self.keys_HSNW)
        best, index = scores.topk(self.k, -1)
        grid = best[:, :, 0, :, None] + best[:, :, 1, None, :]
        score, cell = grid.flatten(-2).topk(self.k, -1)
        row = index[:, :, 0].gather(-1, cell // self.k)
        column = index[:, :, 1].gather(-1, cell % self.k)
        return row * self.n + column, score.softmax(-1)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        neuron, weight = self.find(x_TD)
        ids, weights = neuron.flatten(1), weight.flatten(1)
        hidden = functional.gelu(torch.einsum("td,tnd->tn", x_TD, functional.embedding(ids, self.up_ND))) * weights
        y_TD = torch.einsum("tn,tnd->td", hidden, functional.embedding(ids, self.down_ND))
        return BlockOutput(y_TD, (self.summary(ids, weights.detach()),))

    def summary(self, ids: Tensor, weights: Tensor) -> Routing:
        """The choice over the n rows of the first half: weights_TK are sums over what was chosen of a row, over all heads."""
        mass = weights.new_zeros(len(ids), self.n).scatter_add(1, ids // self.n, weights)
        experts = where(mass > 0, mass)
        return Routing(experts, mass.gather(1, experts.clamp_min(0)).masked_fill(experts < 0, 0.0), mass, mass)


@method("layers.blocks.product_key", kind="block", fidelity="adapted", paper="2407.04153")
def product_key(site: Site, *, n: int = 32, k: int = 8, heads: int = 4, width: int = 32) -> ProductKey:
    """n: keys per side, n^2 neurons. k: neurons read per head. width: of half a query."""
    return ProductKey(site, n, k, heads, width)
