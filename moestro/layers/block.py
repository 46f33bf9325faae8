"""The MoE block: a router, experts and an always-on expert; and what a block and a model return.

Repeated passes and shared pools hand in the same modules again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from moestro.core.routing import RouteContext, Routing
from moestro.layers.experts import ExpertBank
from moestro.layers.router import StagedRouter, penalties


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """y_TD, the routings made (none in a dense layer, several in a block with passes) and the weighted losses by name."""

    y_TD: Tensor
    routings: tuple[Routing, ...] = ()
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """logits_BTV; losses: name -> weighted scalar, summed over the layers (empty in evaluation); routings in order of `Site.layer`."""

    logits_BTV: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    routings: tuple[Routing, ...] = ()

    def light(self) -> Output:
        """Without logits and gradients: what controllers need, cheap to keep over the micro-batches of a step."""
        kept = tuple(Routing(r.experts_TK, r.weights_TK.detach(), None, None) for r in self.routings)
        return Output(self.logits_BTV.new_zeros(0), {name: loss.detach() for name, loss in self.losses.items()}, kept)


@runtime_checkable
class Controller(Protocol):
    """A module whose buffers move after each optimiser step (loss-free balancing)."""

    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        """outputs: this rank's of all micro-batches of the finished step (`Output.light` is enough)."""
        ...


class MoEBlock(nn.Module):
    """y = sum of the routed experts + shared(x). Losses are computed in training only.

    losses: added to the router's own; same contract, and their names must differ from the router's.
    """

    def __init__(
        self,
        router: StagedRouter,
        experts: ExpertBank,
        shared: nn.Module | None = None,
        losses: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.losses = nn.ModuleDict(dict(losses or {}))

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        decision = self.router.decide(x_TD, ctx)
        y_TD = self.experts.run(x_TD, decision.routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        losses = {}
        if ctx.training:
            losses = self.router.penalties(decision) | penalties(self.losses, decision)
        return BlockOutput(y_TD, (decision.routing,), losses)


class Dense(nn.Module):
    """A feed-forward layer without routing, with a block's signature."""

    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.feed_forward = feed_forward

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        return BlockOutput(self.feed_forward(x_TD))
