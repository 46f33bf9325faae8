"""Chain-of-Experts: the same experts run several times in one layer, each pass with its own router on what the last one made.

Paper      Wang et al. 2025, arXiv 2506.18945
Idea       Experts of one layer can use each other's results: K/C experts in each of C passes buy more combinations than K at once.
Rule       x_0 = norm(h); x_t = x_{t-1} + sum over chosen e of g_te E_e(x_{t-1}) + Shared(x_{t-1}); routers differ, experts do not
Needs      router (its top_k is per pass; the paper: raw weights), experts, shared width, losses of the configuration
Gives      a block with `passes` routings per layer
Departs    The block gives x_C - x_0, so that the layer is h + updates and one pass is the plain layer; the released code's default
           drops h and keeps norm(h) instead; output 'stream' gives x_C, which is its outer_residual, h + x_C
Checked    one pass is the plain block bit for bit; tied passes are the layer's function applied twice; routers have their own gradients
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput, MoEBlock
from moestro.layers.decoder import experts_at, losses_at, router_at, shared_at
from moestro.layers.site import Site, require


class Chain(nn.Module):
    """steps: one MoE block per pass; they share their experts."""

    def __init__(self, steps: list[MoEBlock], inner: bool, stream: bool) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.inner, self.stream = inner, stream

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        y_TD, now = x_TD if self.stream else None, x_TD
        routings: tuple[Routing, ...] = ()
        losses: dict[str, Tensor] = {}
        for t, step in enumerate(self.steps):
            out: BlockOutput = step(now, replace(ctx, layer=ctx.layer + t))
            y_TD = out.y_TD if y_TD is None else y_TD + out.y_TD
            now = now + out.y_TD if self.inner else out.y_TD
            routings += out.routings
            for name, loss in out.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        assert y_TD is not None
        return BlockOutput(y_TD, routings, losses)


@method("layers.blocks.chain", kind="block", fidelity="adapted", paper="2506.18945")
def chain(site: Site, *, passes: int = 2, tied: bool = False, inner: bool = True, output: str = "updates") -> Chain:
    """tied: one router for all passes. inner: a pass adds to its input (else it replaces it). output: 'updates' or 'stream'."""
    require(passes >= 1, f"{passes} passes", "at least 1")
    require(output in ("updates", "stream"), f"output {output!r}", "updates or stream")
    bank, full = experts_at(site)
    shared = shared_at(full)
    made: list[MoEBlock] = []
    for t in range(passes):
        at = replace(full, layer=site.layer * passes + t, layers=site.layers * passes)
        router = made[0].router if tied and made else router_at(at)
        made.append(MoEBlock(router, bank, shared, losses_at(at)))
    return Chain(made, inner, output == "stream")
