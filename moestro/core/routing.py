"""What a router decided (`Routing`), what it may know (`RouteContext`), and the pairs that kernels consume.

Shapes: T tokens, E experts, K slots, D model width, N routed pairs (the non-empty slots).
Arrays are numpy or torch, whichever their maker uses; nothing here converts between them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor; torch is never imported here
EMPTY = -1  # the expert id of an empty slot


def namespace(array: Array) -> Any:
    """The module (numpy or torch) that `array` belongs to."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Routed pairs sorted by expert, stable in token then slot order.

    token_N, slot_N, expert_N: int64. weight_N: float. starts_E1: int64 [E+1], so that expert e owns the
    half-open range starts_E1[e]:starts_E1[e+1].
    """

    token_N: Array
    slot_N: Array
    expert_N: Array
    weight_N: Array
    starts_E1: Array


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for T tokens.

    experts_TK: int64; -1 marks an empty slot (variable k, dropped tokens). Ids are unique within a row.
    weights_TK: combine weights, 0 in empty slots.
    logits_TE: scores before normalisation, or None. probs_TE: after normalisation, before any selection-only
    adjustment, or None.
    """

    experts_TK: Array
    weights_TK: Array
    logits_TE: Array | None = None
    probs_TE: Array | None = None

    @property
    def tokens(self) -> int:
        return int(self.experts_TK.shape[0])

    @property
    def slots(self) -> int:
        return int(self.experts_TK.shape[1])

    def pairs(self, num_experts: int) -> Pairs:
        """The non-empty slots grouped by expert. `num_experts` is E, an id of E or more is a programmer's error."""
        xp = namespace(self.experts_TK)
        flat = self.experts_TK.reshape(-1)
        kept = xp.nonzero(flat >= 0)[0] if xp is np else xp.nonzero(flat >= 0).reshape(-1)
        expert = flat[kept]
        order = np.argsort(expert, kind="stable") if xp is np else xp.argsort(expert, stable=True)
        kept, expert = kept[order], expert[order]
        counts = xp.bincount(expert, minlength=num_experts)
        assert counts.shape[0] == num_experts, "routing names an expert beyond E"
        starts = xp.zeros(num_experts + 1, dtype=xp.int64)
        starts[1:] = xp.cumsum(counts, 0)
        k = self.slots
        return Pairs(kept // k if k else kept, kept % k if k else kept, expert, self.weights_TK.reshape(-1)[kept], starts)

    def drop(self, mask_TK: Array, *, renormalise: bool) -> Routing:
        """Empty the slots where `mask_TK` is true. With `renormalise` a row keeps its former sum of weights."""
        xp = namespace(self.experts_TK)
        experts = xp.where(mask_TK, xp.full_like(self.experts_TK, EMPTY), self.experts_TK)
        zero = xp.zeros_like(self.weights_TK)
        weights = xp.where(mask_TK, zero, self.weights_TK)
        if renormalise:
            before, after = self.weights_TK.sum(-1)[:, None], weights.sum(-1)[:, None]
            safe = xp.where(after == 0, xp.ones_like(after), after)
            weights = xp.where(after == 0, zero, weights * (before / safe))
        return replace(self, experts_TK=experts, weights_TK=weights)

    def relabel(self, table_E: Array) -> Routing:
        """Rename expert e to table_E[e] (-1 removes it), as after pruning or merging; colliding slots of a token add up.

        logits and probs are dropped: they speak of the old experts.
        """
        xp = namespace(self.experts_TK)
        empty = self.experts_TK < 0
        ids = xp.where(empty, xp.zeros_like(self.experts_TK), self.experts_TK)
        new = xp.where(empty, xp.full_like(ids, EMPTY), table_E[ids])
        weights = xp.where(new < 0, xp.zeros_like(self.weights_TK), self.weights_TK)
        # same_TKK[t, i, j]: slots i and j of token t now name one expert; the first of them keeps the sum.
        same = (new[:, :, None] == new[:, None, :]) & (new >= 0)[:, :, None]
        summed = (same * weights[:, None, :]).sum(-1)
        slot = xp.arange(new.shape[1])
        earlier = (same & (slot[None, None, :] < slot[None, :, None])).any(-1)
        gone = earlier | (new < 0)
        return Routing(xp.where(gone, xp.full_like(new, EMPTY), new), xp.where(gone, xp.zeros_like(summed), summed), None, None)


@dataclass(frozen=True, slots=True)
class RouteContext:
    """All a router may know besides its input.

    layer: MoE layer ordinal 0..L-1. step: optimiser step (training). token_ids_T, sequence_T, position_T: int64 [T].
    rng: the random generator of the array's library. carry: layer-to-layer state of one forward pass (and what the caller said
    of the tokens: task, modality), changed in place by those who use it. notes: what the stages of one router leave in one call
    for its own losses. x_TD: the router's input, for taps.
    """

    layer: int = 0
    training: bool = False
    step: int = 0
    token_ids_T: Array | None = None
    sequence_T: Array | None = None
    position_T: Array | None = None
    rng: Any = None
    carry: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    x_TD: Array | None = None


OnLogits = Callable[[Array, RouteContext], Array]  # logits_TE -> logits_TE: changes selection and weights
OnChoice = Callable[[Array, RouteContext], Array]  # scores_TE -> scores_TE: changes selection only
OnRouting = Callable[[Routing, RouteContext], Routing]  # edits the decision


@dataclass(frozen=True, slots=True)
class Tap:
    """One edit of a router: `point` is 'logits', 'choice' or 'routing', `fn` the matching callable above."""

    point: str
    fn: Callable[..., Any]


@runtime_checkable
class Router(Protocol):
    """Decides which experts see which token."""

    def __call__(self, x_TD: Array, ctx: RouteContext) -> Routing: ...

    def tapped(self, *taps: Tap) -> Router:
        """A router with these edits, sharing the weights; the original is untouched."""
        ...
