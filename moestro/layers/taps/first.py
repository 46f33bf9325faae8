"""First: of the experts chosen for a token only the `number` heaviest run.

Paper      none
Idea       The cheapest way to compute less: a smaller k, in the layers that can bear it, without training.
Rule       pair (t, j) is dropped when `number` or more pairs of t are heavier; ties to the earlier slot
Needs      nothing
Gives      a routing with empty slots where pairs were dropped; torch or numpy, as it comes
Departs    nothing
Checked    number = K changes nothing; 1 is top-1; every token keeps exactly `number`; numpy and torch agree
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import Array, RouteContext, Routing, namespace

if TYPE_CHECKING:
    from moestro.layers.site import Site


class First:
    """The tap. renormalise: a token keeps its sum of weights."""

    point = "routing"

    def __init__(self, number: int, renormalise: bool) -> None:
        if number < 1:
            raise InputError(f"{number} experts of each token are to run", expected="at least 1")
        self.number, self.renormalise = number, renormalise

    def __call__(self, routing: Routing, ctx: RouteContext) -> Routing:
        return routing.drop(rank(routing) >= self.number, renormalise=self.renormalise)


def rank(routing: Routing) -> Array:
    """rank_TK: how many slots of the token are heavier, or as heavy and earlier; empty slots come last."""
    xp = namespace(routing.weights_TK)
    weights_TK = xp.where(routing.experts_TK < 0, xp.full_like(routing.weights_TK, -float("inf")), routing.weights_TK)
    heavier_TKK = weights_TK[:, None, :] > weights_TK[:, :, None]
    slot_K = xp.arange(routing.slots)
    same_TKK = (weights_TK[:, None, :] == weights_TK[:, :, None]) & (slot_K[None, :] < slot_K[:, None])[None]
    return (heavier_TKK | same_TKK).sum(-1)


@method("layers.taps.first", kind="tap", fidelity="exact")
def first(site: Site | None, *, number: int = 1, renormalise: bool = False) -> First:
    """In training and in evaluation alike."""
    return First(number, renormalise)
