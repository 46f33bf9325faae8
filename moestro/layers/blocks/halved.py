"""Halved block: half the always-on expert, half the routed ones.

Paper      Shen et al. 2025, AdaMoE for vision-language-action models, arXiv 2510.14300; Qiu et al. 2024, RMoE, arXiv 2408.06793 (optional)
Idea       The always-on expert and the routed ones keep their shares of the output whatever the gate's weights are.
Rule       y = share shared(x) + (1 - share) sum over chosen e of g_e expert_e(x)
Needs      router, experts, special, d_shared (0: as wide as an expert), losses and taps of the configuration
Gives      a block
Departs    nothing
Checked    the rule written out; share 0 and 1
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import BlockOutput, MoEBlock
from moestro.layers.decoder import experts_at, losses_at, router_at
from moestro.layers.experts import ExpertBank, Shared, down_std, spec_at
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require


class Halved(nn.Module):
    """A routed block whose output is mixed with an always-on expert's."""

    def __init__(
        self, router: StagedRouter, experts: ExpertBank, always: Shared, losses: dict[str, nn.Module], share: float
    ) -> None:
        super().__init__()
        self.routed, self.always, self.share = MoEBlock(router, experts, None, losses), always, share

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        out = self.routed(x_TD, ctx)
        y_TD = self.share * self.always(x_TD) + (1 - self.share) * out.y_TD
        return BlockOutput(y_TD, out.routings, out.losses)


@method("layers.blocks.halved", kind="block", fidelity="exact", paper="2510.14300")
def halved(site: Site, *, share: float = 0.5) -> Halved:
    """share: of the always-on expert, 0 to 1."""
    c = site.config
    assert c is not None
    require(0 <= share <= 1, f"share {share}", "0 to 1")
    bank, full = experts_at(site)
    width = c.d_shared or c.d_expert
    always = Shared(spec_at(site, width), gate=c.shared_gate, std=site.init_std, down_std=down_std(site))
    return Halved(router_at(full), bank, always, losses_at(full), share)
