"""UniPool: one pool of experts for the whole network, a router of its own for each layer.

Paper      UniPool, 2026, arXiv 2605.06665
Idea       Which experts a layer needs is left to its router: experts belong to no layer, and balance is asked of the pool.
Rule       layer l: y = sum over chosen e of g_le E_e(x); E_e the same storage in all layers (of a group of adjacent layers)
Needs      num_experts is the size of the pool, not of a layer; the paper's router is `norm`, its loss `pool` with the layers' own
           balance off, as in the recipe `unipool`; any other router and loss works
Gives      a model whose expert weights do not grow with its layers
Departs    dense layers are not part of it. The lock of a later revision is not built
Checked    one storage; gradients add up over the layers; groups; recipe trained
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from moestro.core.method import method
from moestro.layers.block import MoEBlock
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder, decoder_layers, experts_at, losses_at, router_at, shared_at
from moestro.layers.site import Site, require


@method("layers.architectures.unipool", kind="architecture", fidelity="faithful", paper="2605.06665")
def unipool(config: MoEConfig, *, group: int = 0) -> Decoder:
    """group: adjacent MoE layers that share a pool, 0 for all."""
    require(group >= 0, f"groups of {group} layers", "0 or more")
    total = len(config.moe_layers)
    size = group or max(1, total)
    pools: list[dict[str, nn.Module]] = [{} for _ in range(0, total, size)]
    banks: dict[int, nn.Module] = {}

    def block(site: Site) -> MoEBlock:
        number = site.layer // size
        site = replace(site, pool=pools[number])
        if number not in banks:
            banks[number] = experts_at(site)[0]
        bank = banks[number]
        site = replace(site, num_experts=bank.num, experts=bank)
        return MoEBlock(router_at(site), bank, shared_at(site), losses_at(site))  # type: ignore[arg-type]

    return Decoder(config, decoder_layers(config, block=block))
