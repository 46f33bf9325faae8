"""Low-rank experts: what differs between experts has few ranks, on top of one common feed-forward layer.

Paper      none is followed to the letter; the form of experts as adapters (Zadouri et al. 2023, arXiv 2309.05444)
Idea       Many experts at the price of a few: a shared full matrix and a product of two thin ones per expert.
Rule       W_e = W + B_e A_e for the inner map and for the output map; B_e starts at zero, so all experts start equal
Needs      d_expert, activation and gated of the configuration
Gives      a bank of E experts
Departs    the paper adapts attention with soft mixing; here the experts are feed-forward layers and are routed to
Checked    equal to experts with the product added to the weights; at the start all experts agree
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.experts import ExpertWeights
from moestro.core.method import method
from moestro.layers.dispatch import grouped_linear
from moestro.layers.experts import FFN, ExpertBank, activate, down_std, spec_at
from moestro.layers.site import Site, require


class LowRank(ExpertBank):
    """inner_RD [rows, D] and outer_DF are common; in_a, in_b, out_a, out_b [E, ...] are each expert's own factors of rank `rank`."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        spec = spec_at(site)
        require(rank >= 1, f"rank {rank}", "at least 1")
        require(not spec.bias, "low-rank experts with biases", "bias false")
        e, d, f, rows = site.num_experts, spec.d_model, spec.d_expert, spec.d_expert * (2 if spec.gated else 1)
        self.spec, self.kinds = spec, (FFN,) * e
        self.costs = (rows * d + d * f + rank * (2 * d + rows + f),) * e
        self.inner_RD = nn.Parameter(torch.randn(rows, d) * site.init_std)
        self.outer_DF = nn.Parameter(torch.randn(d, f) * down_std(site))
        self.in_a = nn.Parameter(torch.randn(e, rank, d) * d**-0.5)
        self.in_b = nn.Parameter(torch.zeros(e, rows, rank))
        self.out_a = nn.Parameter(torch.randn(e, rank, f) * f**-0.5)
        self.out_b = nn.Parameter(torch.zeros(e, d, rank))

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        own = grouped_linear(grouped_linear(x_ND, self.in_a, starts), self.in_b, starts)
        a_NF = activate(functional.linear(x_ND, self.inner_RD.to(x_ND.dtype)) + own, self.spec)
        own = grouped_linear(grouped_linear(a_NF, self.out_a, starts), self.out_b, starts)
        return functional.linear(a_NF, self.outer_DF.to(a_NF.dtype)) + own

    def weights(self, e: int) -> ExpertWeights:
        """The full matrices of one expert."""
        inner, f = self.inner_RD + self.in_b[e] @ self.in_a[e], self.spec.d_expert
        gate, up = (inner[:f], inner[f:]) if self.spec.gated else (None, inner)
        return ExpertWeights(gate, up, self.outer_DF + self.out_b[e] @ self.out_a[e])


@method("layers.banks.low_rank", kind="experts", fidelity="adapted", paper="2309.05444")
def low_rank(site: Site, *, rank: int = 8) -> LowRank:
    """rank: of each expert's own part."""
    return LowRank(site, rank)
