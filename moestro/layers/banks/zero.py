"""Zero experts: choosing one adds nothing and costs nothing.

Paper      Jin et al. 2024, MoE++, arXiv 2410.07348; null experts: Zeng et al. 2024, AdaMoE, arXiv 2406.13233
Idea       A token that needs fewer experts spends a slot on nothing.
Rule       y = 0; the pair is never dispatched
Needs      nothing
Gives      a bank of kind 'zero', to be placed behind other experts
Departs    nothing
Checked    output zero; costs zero; a routing through it equals the routing without that slot
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.method import method
from moestro.layers.experts import ExpertBank, spec_at
from moestro.layers.site import Site, require


class Zero(ExpertBank):
    """`count` experts that give zero."""

    def __init__(self, site: Site, count: int) -> None:
        super().__init__()
        require(count >= 1, f"{count} zero experts", "at least 1")
        self.kinds, self.costs, self.spec = ("zero",) * count, (0,) * count, spec_at(site)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        return torch.zeros_like(x_ND)


@method("layers.banks.zero", kind="experts", fidelity="exact", paper="2410.07348")
def zero(site: Site, *, count: int = 1) -> Zero:
    """count: how many ids they take."""
    return Zero(site, count)
