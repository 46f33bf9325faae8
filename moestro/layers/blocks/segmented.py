"""Segmented block: experts cut into small ones, some of them always on, at equal total and active size.

Paper      Dai et al. 2024, DeepSeekMoE, arXiv 2401.06066
Idea       E experts of which a token has K are m E experts of which it has m K: the same parameters, far more combinations. S of the small
           ones see every token, so that the others need not all learn what is common.
Rule       experts of width F / m; m E - S routed, m K - S chosen; y = shared(x) + sum over chosen e of g_e expert_e(x), where the S shared
           experts are one feed-forward of width S F / m
Needs      num_experts, top_k and d_expert of the configuration, as of the uncut experts; its router, experts, special and losses
Gives      a block with m E - S routed experts
Departs    nothing. d_shared of the configuration adds to the shared width
Checked    slices that are all on with weight 1 are the uncut expert; total and active parameters are equal before and after
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moestro.core.method import method
from moestro.layers.block import MoEBlock
from moestro.layers.decoder import experts_at, losses_at, router_at
from moestro.layers.experts import Shared, down_std, spec_at
from moestro.layers.site import Site, require


def segmented_site(site: Site, segments: int, shared: int) -> Site:
    """The site of the small routed experts. Raises InputError for cuts that cannot be."""
    e, k, f = site.num_experts * segments - shared, site.top_k * segments - shared, site.d_expert
    require(segments >= 1 and f % segments == 0, f"experts of width {f} in {segments} segments", "a divisor of the width")
    require(shared >= 0 and k >= 1, f"{shared} shared of {k + shared} active experts", "at least one that is routed")
    return replace(site, num_experts=e, top_k=k, d_expert=f // segments)


@method("layers.blocks.segmented", kind="block", fidelity="faithful", paper="2401.06066")
def segmented(site: Site, *, segments: int = 4, shared: int = 1) -> MoEBlock:
    """segments: m, how many small experts an expert becomes. shared: S, how many of the small ones are always on."""
    assert site.config is not None
    bank, cut = experts_at(segmented_site(site, segments, shared))
    width = shared * cut.d_expert + site.config.d_shared
    always: nn.Module | None = None
    if width:
        always = Shared(spec_at(site, width), gate=site.config.shared_gate, std=site.init_std, down_std=down_std(site))
    return MoEBlock(router_at(cut), bank, always, losses_at(cut))
