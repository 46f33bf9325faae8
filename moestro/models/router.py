"""A transformers router as a `Router`: run by its own code, its decision taken where the experts are called.

Three kinds of edit reach inside without knowing the family: the router's own linear map is watched for the logits, its own
top-k for the choice, and the decision itself is edited afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moestro.core.errors import UnsupportedModel
from moestro.core.routing import RouteContext, Router, Routing, Tap
from moestro.models.live import Seam

if TYPE_CHECKING:
    import torch


class _Decided(Exception):
    """Leaves a block as soon as it has routed."""

    def __init__(self, index_TK: Any, weights_TK: Any) -> None:
        super().__init__()
        self.index_TK, self.weights_TK = index_TK, weights_TK


class Wire:
    """Stands around a router's forward: keeps its logits and lets taps change logits and choice."""

    def __init__(self, seam: Seam) -> None:
        self._facts = seam.facts
        self._taps: tuple[Tap, ...] = ()
        self._ctx = RouteContext()
        self._chosen = False
        self.logits_TE: torch.Tensor | None = None
        if (router := seam.router) is not None:
            self._original = router.forward
            router.forward = self._forward

    @contextmanager
    def tapped(self, taps: tuple[Tap, ...], ctx: RouteContext) -> Iterator[None]:
        """Within, the router obeys these taps. Raises UnsupportedModel when it has no top-k for a 'choice' tap to change."""
        before = self._taps, self._ctx
        self._taps, self._ctx, self._chosen = taps, ctx, False
        try:
            yield
            if any(tap.point == "choice" for tap in taps) and not self._chosen:
                raise UnsupportedModel(
                    f"the router of MoE layer {self._facts.ordinal} does not choose by a top-k of scores",
                    expected="taps of kind 'logits' or 'routing'",
                    fix="use a 'logits' tap: it changes choice and weights together",
                )
        finally:
            self._taps, self._ctx = before

    def probs(self) -> torch.Tensor | None:
        """probs_TE by the router's score function, for those that have one over all experts."""
        if self.logits_TE is None or self._facts.router.score not in ("softmax", "sigmoid"):
            return None
        logits_TE = self.logits_TE.float()
        return logits_TE.softmax(-1) if self._facts.router.score == "softmax" else logits_TE.sigmoid()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.logits_TE = None
        with self._mode():
            return self._original(*args, **kwargs)

    def _mode(self) -> Any:
        import torch
        from torch.overrides import TorchFunctionMode

        wire, num, top_k = self, self._facts.num_experts, self._facts.top_k
        linear, topk = torch.nn.functional.linear, (torch.topk, torch.Tensor.topk)

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                kwargs = kwargs or {}
                if func is linear and wire.logits_TE is None:
                    out = func(*args, **kwargs)
                    if out.shape[-1] == num:
                        for tap in wire._taps:
                            out = tap.fn(out, wire._ctx) if tap.point == "logits" else out
                        wire.logits_TE = out.detach()
                    return out
                if func in topk and args[0].ndim == 2 and args[0].shape[-1] == num:
                    k = kwargs.get("k", args[1] if len(args) > 1 else None)
                    if k == top_k and any(tap.point == "choice" for tap in wire._taps):
                        scores_TE = args[0]
                        for tap in wire._taps:
                            scores_TE = tap.fn(scores_TE, wire._ctx) if tap.point == "choice" else scores_TE
                        wire._chosen = True
                        index_TK = func(scores_TE, *args[1:], **kwargs).indices
                        return torch.return_types.topk((args[0].gather(-1, index_TK), index_TK))  # type: ignore[attr-defined]
                return func(*args, **kwargs)

        return Mode()


class LiveRouter:
    """The router of one live layer. Calling it runs the block's own code up to the call of the experts."""

    def __init__(self, seam: Seam, wire: Wire, taps: tuple[Tap, ...] = ()) -> None:
        self._seam, self._wire, self.taps = seam, wire, taps

    def tapped(self, *taps: Tap) -> Router:
        """A router with these edits on top of its own, sharing the weights."""
        return LiveRouter(self._seam, self._wire, self.taps + taps)

    def __call__(self, x_TD: torch.Tensor, ctx: RouteContext) -> Routing:
        ctx = replace(ctx, x_TD=x_TD)
        with self._wire.tapped(self.taps, ctx):
            index_TK, weights_TK = decide(self._seam, x_TD)
        return self.edited(Routing(index_TK, weights_TK, self._wire.logits_TE, self._wire.probs()), ctx)

    def edited(self, routing: Routing, ctx: RouteContext) -> Routing:
        """The decision after the 'routing' taps."""
        for tap in self.taps:
            if tap.point == "routing":
                routing = tap.fn(routing, ctx)
        return routing


@contextmanager
def answering(seam: Seam, fn: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    """Within, the experts' calls of one seam go to `fn`."""
    before = seam.experts.moestro_fn
    seam.connect(fn)
    try:
        yield
    finally:
        seam.connect(before)


def decide(seam: Seam, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a block's own code on x_TD up to its call of the experts; returns index_TK and weights_TK of that call."""

    def stop(hidden: Any, index_TK: Any, weights_TK: Any) -> Any:
        raise _Decided(index_TK, weights_TK)

    with answering(seam, stop):
        try:
            seam.block(x_TD[None])
        except _Decided as decided:
            return decided.index_TK, decided.weights_TK
    raise UnsupportedModel(f"{type(seam.block).__name__} did not call its experts")


def without_experts(seam: Seam, x_TD: torch.Tensor) -> torch.Tensor:
    """y_TD of a block whose experts answer zeros: what its shared experts add."""
    import torch

    with answering(seam, lambda hidden, index, weights: torch.zeros_like(hidden)):
        out = seam.block(x_TD[None])
    return (out[0] if isinstance(out, tuple) else out).reshape(x_TD.shape)
