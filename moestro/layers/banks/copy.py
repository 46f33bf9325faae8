"""Copy experts: the expert's output is its input.

Paper      Jin et al. 2024, MoE++, arXiv 2410.07348
Idea       A skip that the router can choose, at no cost.
Rule       y = x, the block's normalised input (not the residual stream)
Needs      nothing
Gives      a bank of kind 'copy', to be placed behind other experts
Departs    nothing
Checked    output equals input; costs zero
"""

from __future__ import annotations

from torch import Tensor

from moestro.core.method import method
from moestro.layers.experts import ExpertBank, spec_at
from moestro.layers.site import Site, require


class Copy(ExpertBank):
    """`count` experts that give their input."""

    def __init__(self, site: Site, count: int) -> None:
        super().__init__()
        require(count >= 1, f"{count} copy experts", "at least 1")
        self.kinds, self.costs, self.spec = ("copy",) * count, (0,) * count, spec_at(site)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        return x_ND


@method("layers.banks.copy", kind="experts", fidelity="exact", paper="2410.07348")
def copy(site: Site, *, count: int = 1) -> Copy:
    """count: how many ids they take."""
    return Copy(site, count)
