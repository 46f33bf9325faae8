"""The routed block: one routing decision, its experts, and an always-on expert where asked for.

Paper      the common form of every MoE layer since Shazeer et al. 2017, arXiv 1701.06538
Idea       Each token runs through the few experts that its router chose.
Rule       y = sum over chosen e of g_e expert_e(x) + shared(x)
Needs      router, experts, special, losses and taps of the configuration
Gives      a block
Departs    nothing
Checked    equal to a loop over tokens and experts written out
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.block import MoEBlock
from moestro.layers.decoder import block_at
from moestro.layers.site import Site


@method("layers.blocks.routed", kind="block", fidelity="exact", paper="1701.06538")
def routed(site: Site) -> MoEBlock:
    """What the configuration's router, experts, shared width and losses say."""
    return block_at(site)
