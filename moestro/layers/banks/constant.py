"""Constant experts: a mixture of the input and one learned vector.

Paper      Jin et al. 2024, MoE++, arXiv 2410.07348
Idea       Tokens that need no computation may still be replaced by something learned.
Rule       y = a_1 x + a_2 v_e, (a_1, a_2) = softmax(W_e x), W_e in R^{2 x D}, v_e drawn from N(0, 1)
Needs      nothing
Gives      a bank of kind 'constant', to be placed behind other experts
Departs    nothing
Checked    the rule written out, expert by expert
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.dispatch import grouped_linear
from moestro.layers.experts import ExpertBank, per_row, spec_at
from moestro.layers.site import Site, require


class Constant(ExpertBank):
    """`count` constant experts: mix_E2D and vector_ED."""

    def __init__(self, site: Site, count: int) -> None:
        super().__init__()
        require(count >= 1, f"{count} constant experts", "at least 1")
        self.kinds, self.costs, self.spec = ("constant",) * count, (2 * site.d_model,) * count, spec_at(site)
        self.mix_E2D = nn.Parameter(torch.randn(count, 2, site.d_model) * site.init_std)
        self.vector_ED = nn.Parameter(torch.randn(count, site.d_model))

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        share_N2 = grouped_linear(x_ND, self.mix_E2D, starts).softmax(-1)
        return share_N2[:, :1] * x_ND + share_N2[:, 1:] * per_row(self.vector_ED, starts).to(x_ND.dtype)


@method("layers.banks.constant", kind="experts", fidelity="exact", paper="2410.07348")
def constant(site: Site, *, count: int = 1) -> Constant:
    """count: how many ids they take."""
    return Constant(site, count)
