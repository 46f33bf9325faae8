"""Experts of different widths.

Paper      Wang et al. 2024, HMoE, arXiv 2408.10681 (arithmetic widths)
Idea       Small experts for easy tokens, large ones where they are worth it.
Rule       y = down_e(act(gate_e(x)) * up_e(x)), each expert with its own width; the mean width is d_expert
           'arithmetic': widths rise evenly from first_share to 2 - first_share times the mean
Needs      d_expert, activation, gated and bias of the configuration
Gives      a bank of E experts, narrowest first
Departs    nothing
Checked    the widths' sum; each expert equals a feed-forward layer of its width
"""

from __future__ import annotations

from itertools import pairwise

from moestro.core.method import method
from moestro.layers.experts import Joined, Stacked, down_std, spec_at
from moestro.layers.site import Site, require


def arithmetic(count: int, mean: int, first_share: float) -> list[int]:
    """Rising widths with the given mean; rounding is spread so that the sum is exactly count * mean."""
    if count == 1:
        return [mean]
    steps = [mean * (first_share + (2 - 2 * first_share) * i / (count - 1)) for i in range(count)]
    edges = [round(sum(steps[:i])) for i in range(count + 1)]
    return sorted(b - a for a, b in pairwise(edges))


@method("layers.banks.widths", kind="experts", fidelity="faithful", paper="2408.10681")
def widths(site: Site, *, widths: list[int] | None = None, first_share: float = 0.5625) -> Joined:
    """widths: one per expert; without them, arithmetic from first_share (the paper's 9 of 16) of d_expert upwards."""
    sizes = arithmetic(site.num_experts, site.d_expert, first_share) if widths is None else list(widths)
    require(len(sizes) == site.num_experts, f"{len(sizes)} widths for {site.num_experts} experts", "one each")
    require(all(isinstance(w, int) and w > 0 for w in sizes), f"widths {sizes}", "whole numbers above 0")
    std, small = site.init_std, down_std(site)
    return Joined([Stacked(1, spec_at(site, width), std=std, down_std=small) for width in sizes])
