"""ReXMoE: routers of adjacent layers choose from the union of those layers' experts, which is opened little by little.

Paper      2025, arXiv 2510.17483
Idea       Reusing the neighbours' experts multiplies the combinations at the price of wider routers; too early a choice is harmful.
Rule       layers r g .. r g + r - 1 share U = the union of their E experts each; s = softmax(x W_l^T) over r E, top-k of them
           step t: N_t = E up to `begin`, floor((1 + (r-1)(t - begin)/(end - begin)) E) up to `end`, then r E; of the candidates
           r E - N_t are masked, drawn anew each step ('random'), or all but the layer's own and their next neighbours ('local')
Needs      router, experts, shared, losses of the configuration; num_experts is E, of one layer
Gives      a model; ids of a routing speak of the pool, layer by layer
Departs    A masked candidate is never chosen and its score still counts in softmax. 'local' is not the paper's: at N_t = E it is the plain
           model. Evaluation masks in 'local' only, by the saved N_t. A last group may have fewer layers. Special experts are not shared
Checked    N_t by hand; masked experts get nothing; 'local' before `begin` equals a plain model; one storage
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import MoEBlock, Output
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder, decoder_layers, experts_at, losses_at, router_at, shared_at, site_of
from moestro.layers.experts import ExpertBank, Joined
from moestro.layers.site import Site, require


class Progressive(nn.Module):
    """The tap that masks candidates, the same on every rank; opened is N_t of the last step, for evaluation."""

    point = "choice"
    opened: Tensor

    def __init__(self, own: int, pool: int, first: int, begin: int, end: int, mask: str, seed: int) -> None:
        super().__init__()
        self.own, self.pool, self.first, self.begin, self.end, self.mask, self.seed = own, pool, first, begin, end, mask, seed
        self.register_buffer("opened", torch.tensor(self.count(0)))

    def count(self, step: int) -> int:
        """N_t."""
        if step <= self.begin:
            return self.own
        if step > self.end:
            return self.pool
        share = (step - self.begin) / (self.end - self.begin)
        return int((1 + (self.pool / self.own - 1) * share) * self.own + 1e-9)

    def allowed(self, step: int, training: bool) -> Tensor:
        """bool_E: the candidates of a step."""
        if self.mask == "local":
            count = self.count(step) if training else int(self.opened)
            order = (torch.arange(self.pool) + self.first) % self.pool
        else:
            count = self.count(step) if training else self.pool
            rng = torch.Generator().manual_seed(self.seed + 1_000_003 * step)
            order = torch.randperm(self.pool, generator=rng)
        allowed = torch.zeros(self.pool, dtype=torch.bool)
        allowed[order[:count]] = True
        return allowed

    def forward(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE.masked_fill(~self.allowed(ctx.step, ctx.training).to(scores_TE.device), float("-inf"))

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        self.opened.fill_(self.count(step + 1))


@method("layers.architectures.rexmoe", kind="architecture", fidelity="adapted", paper="2510.17483")
def rexmoe(config: MoEConfig, *, reuse: int = 2, begin: int = 10_000, end: int = 30_000, mask: str = "random") -> Decoder:
    """reuse: r, layers in a group. begin, end: steps between which the pool is opened; the paper's are for 50,000 steps."""
    require(reuse >= 1, f"groups of {reuse} layers", "at least 1")
    require(0 <= begin < end, f"begin {begin}, end {end}", "begin before end")
    require(mask in ("random", "local"), f"mask {mask!r}", "random or local")
    require(not config.special, "special experts", "none: a pool of layers has routed experts only")
    banks: list[ExpertBank] = [experts_at(site_of(config, i, {}))[0] for i in range(len(config.moe_layers))]

    def block(site: Site) -> MoEBlock:
        first = site.layer // reuse * reuse
        group = banks[first : first + reuse]
        bank = Joined(group) if len(group) > 1 else group[0]
        own = group[site.layer - first].num
        start = sum(other.num for other in group[: site.layer - first])
        at = replace(site, num_experts=bank.num, experts=bank)
        tap = Progressive(own, bank.num, start, begin, end, mask, config.seed * 1009 + site.layer)
        return MoEBlock(router_at(at).tapped(tap), bank, shared_at(at), losses_at(at))

    return Decoder(config, decoder_layers(config, block=block))
