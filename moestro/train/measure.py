"""How evenly a step's tokens were spread over the experts: counts over all its micro-batches and processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.routing import Routing
from moestro.layers.block import MoEBlock
from moestro.layers.experts import FFN
from moestro.layers.reduce import counts
from moestro.layers.router import StagedRouter
from moestro.train.parallel import Group


class Meter:
    """Counts the routings of one step, then gives the step's figures.

    MaxVio = max over experts of c_e / mean c - 1, c over the experts that cost matrix products; 0 is even. active: such experts per
    token. dropped: share of the chosen pairs that a tap on the routing removed (capacity). unrouted: share of tokens without any expert.
    """

    def __init__(self, module: nn.Module) -> None:
        self._working = [block.experts.kinds for block in module.modules() if isinstance(block, MoEBlock)]
        self._taps = [tap for m in module.modules() if isinstance(m, StagedRouter) for tap in m.taps if tap.point == "routing"]
        self.clear()

    def clear(self) -> None:
        self._counts: list[Tensor] = []  # per routing, count_E
        self._sums = torch.zeros(4)  # tokens, tokens without expert, pairs removed, pairs chosen by routers with such a tap

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the taps on the routing remove while this is open."""
        handles = [tap.register_forward_hook(self._removed) for tap in self._taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Count one forward pass. Routings have their logits: they say how many experts there are."""
        for i, routing in enumerate(routings):
            assert routing.logits_TE is not None, "routings of a training pass carry logits"
            count_E = counts(routing.experts_TK, routing.logits_TE.shape[1])
            if i < len(self._counts):
                self._counts[i] += count_E
            else:
                self._counts.append(count_E)
            self._sums[0] += routing.tokens
            self._sums[1] += (routing.experts_TK < 0).all(-1).sum()

    def _removed(self, tap: nn.Module, given: Any, after: Routing) -> None:
        before = int((given[0].experts_TK >= 0).sum())
        self._sums[2] += max(0, before - int((after.experts_TK >= 0).sum()))
        self._sums[3] += before

    def figures(self, group: Group) -> dict[str, float]:
        """The figures of all processes since `clear`; {} for a model without routing. Every process must call it."""
        if not self._counts:
            return {}
        flat = group.sum(torch.cat([*self._counts, self._sums]).double())
        tokens, unrouted, removed, chosen = flat[-4:].tolist()
        violations, active, at = [], 0.0, 0
        for i, count in enumerate(self._counts):
            count_E = flat[at : at + len(count)]
            at += len(count)
            if self._working and len(self._counts) % len(self._working) == 0:
                kinds = self._working[i * len(self._working) // len(self._counts)]
                if len(kinds) == len(count):
                    count_E = count_E[torch.tensor([kind == FFN for kind in kinds])]
            mean = float(count_E.mean())
            violations.append(float(count_E.max()) / mean - 1 if mean > 0 else 0.0)
            active += float(count_E.sum())
        return {
            "maxvio": sum(violations) / len(violations),
            "maxvio_worst": max(violations),
            "active": active / tokens,
            "dropped": removed / chosen if chosen else 0.0,
            "unrouted": unrouted / tokens,
        }
