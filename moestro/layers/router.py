"""The staged router: score -> normalise -> select -> combine, with taps between the stages. Trainable, ragged, tapped by copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.routing import EMPTY, RouteContext, Routing, Tap
from moestro.layers.stages import Combine, Draft

Score = Callable[[Tensor, RouteContext], Tensor]
Normalise = Callable[[Tensor, RouteContext], Tensor]
Select = Callable[[Tensor, RouteContext], Tensor]
Weigh = Callable[[Draft, RouteContext], Tensor]
POINTS = ("logits", "choice", "routing")


@dataclass(frozen=True, slots=True)
class Decision:
    """All that a loss may read of one routing.

    x_TD: the router's input, float32. ctx: its context; ctx.notes holds what the stages left. chosen: as selected, before the
    taps on the routing. routing: what the experts get, after them (drops done). logits and probs are in both.
    """

    x_TD: Tensor
    ctx: RouteContext
    chosen: Routing
    routing: Routing

    @property
    def num_experts(self) -> int:
        return int(self.logits_TE.shape[1])

    @property
    def logits_TE(self) -> Tensor:
        assert self.chosen.logits_TE is not None
        return self.chosen.logits_TE

    @property
    def probs_TE(self) -> Tensor:
        assert self.chosen.probs_TE is not None
        return self.chosen.probs_TE


class _Tap(nn.Module):
    """A tap as a module, so that its buffers are saved and moved with the router."""

    def __init__(self, tap: Tap | nn.Module) -> None:
        super().__init__()
        self.point: str = tap.point  # type: ignore[assignment]
        self.fn = tap.fn if isinstance(tap, Tap) else tap
        assert self.point in POINTS, self.point

    def forward(self, value: Any, ctx: RouteContext) -> Any:
        return self.fn(value, ctx)  # type: ignore[operator]


class StagedRouter(nn.Module):
    """A router made of stages (see `layers.stages`), taps and its own losses.

    Stages and taps are plain callables or modules; modules are saved with the model. A tap is a `core.routing.Tap`, or a module
    with `point` ('logits', 'choice' or 'routing'). losses: name -> module from a `Decision` to a weighted scalar, computed in
    training only. All arithmetic is float32, whatever the model's type and autocast.
    """

    def __init__(
        self,
        *,
        score: Score,
        select: Select,
        combine: Weigh,
        normalise: Normalise,
        taps: Iterable[Tap | nn.Module] = (),
        losses: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.score, self.normalise, self.select, self.combine = score, normalise, select, combine
        self.taps = nn.ModuleList(_Tap(tap) for tap in taps)
        self.losses = nn.ModuleDict(dict(losses or {}))

    def forward(self, x_TD: Tensor, ctx: RouteContext | None = None) -> Routing:
        return self.decide(x_TD, ctx or RouteContext(training=self.training)).routing

    def decide(self, x_TD: Tensor, ctx: RouteContext) -> Decision:
        """Route, and keep what losses need. Raises InputError when a logit is NaN."""
        ctx = replace(ctx, notes={})
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            ctx = replace(ctx, x_TD=x_TD)
            logits_TE = self._tapped("logits", self.score(x_TD, ctx), ctx)
            if bool(torch.isnan(logits_TE.detach().sum())) and bool(torch.isnan(logits_TE).any()):
                raise InputError(
                    f"the router of MoE layer {ctx.layer} gave NaN at step {ctx.step}",
                    expected="finite logits",
                    fix="training has diverged or the weights are damaged: lower the learning rate, or resume from an earlier checkpoint",
                )
            probs_TE = self.normalise(logits_TE, ctx)
            scores_TE = self._tapped("choice", probs_TE.detach(), ctx)
            experts_TK = self.select(scores_TE, ctx)
            never = (scores_TE.gather(1, experts_TK.clamp_min(0)) == float("-inf")) | (experts_TK < 0)
            experts_TK = experts_TK.masked_fill(never, EMPTY)
            weights_TK = self.combine(Draft(x_TD, logits_TE, probs_TE, experts_TK), ctx)
            picked = Routing(experts_TK, weights_TK, logits_TE, probs_TE)
            return Decision(x_TD, ctx, picked, self._tapped("routing", picked, ctx))

    def penalties(self, decision: Decision) -> dict[str, Tensor]:
        """The named losses of one decision, weighted."""
        return penalties(self.losses, decision)

    def tapped(self, *taps: Tap | nn.Module) -> StagedRouter:
        """A router with these taps after its own, sharing weights and buffers; this one is untouched."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.taps = nn.ModuleList([*self.taps, *(_Tap(tap) for tap in taps)])
        return other

    @property
    def convention(self) -> str:
        """The combine convention in words, as saved with the model."""
        stage = self.combine
        return f"{stage.convention} x {stage.scale:g}" if isinstance(stage, Combine) else type(stage).__name__

    def _tapped(self, point: str, value: Any, ctx: RouteContext) -> Any:
        for tap in self.taps:
            if tap.point == point:
                value = tap(value, ctx)
        return value


def penalties(losses: nn.ModuleDict, decision: Decision) -> dict[str, Tensor]:
    """The named losses of one decision, in float32; zero without tokens."""
    if not decision.x_TD.shape[0]:
        return {name: decision.logits_TE.sum() for name in losses}
    with torch.autocast(decision.x_TD.device.type, enabled=False):
        return {name: loss(decision) for name, loss in losses.items()}
