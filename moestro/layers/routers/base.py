"""BASE: in training tokens and experts are matched so that every expert gets the same number; afterwards the best expert is taken.

Paper      Lewis et al. 2021, arXiv 2103.16716
Idea       A balanced assignment of the largest total score needs no balance loss and no hyper-parameter.
Rule       s_te = x_t . w_e; training: a_t maximises sum_t s_{t,a_t} with T / E tokens per expert; evaluation: a_t = argmax_e s_te
           y = sigmoid(s_{t,a_t}) f_{a_t}(x), beside the residual
           auction: each expert bids for its T / E most valuable tokens (value = score - cost) what they are worth more than the next one,
           plus epsilon; the highest bidder holds a token and its cost rises by the bid; until every token is held
Needs      nothing; top_k of the configuration is not read: it is 1. The paper's experts are the bank `sublayers`
Gives      a router without losses
Departs    each process assigns its own batch, without shuffling tokens among processes. When E does not divide T, tokens of score 0
           fill up and an expert gets at most ceil(T / E). Traits batch-in-training and causal-in-training: the assignment
           sees the whole batch; evaluation sees one token
Checked    the exact solver against scipy; the auction within T epsilon of it; equal loads; identity at the start with `sublayers`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK, identity

SOLVERS = ("auction", "exact")
_MOST_ROUNDS = 5000


class Centroids(Linear):
    """The gate, with orthogonal rows of norm `gain` (as far as D allows)."""

    def __init__(self, site: Site, gain: float) -> None:
        super().__init__(site)
        nn.init.orthogonal_(self.gate.weight, gain=gain)


class BalancedOne:
    """One expert per token: balanced in training, the best in evaluation."""

    def __init__(self, solver: str) -> None:
        self.solver = solver

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        if not ctx.training or not scores_TE.shape[0]:
            return TopK(1)(scores_TE, ctx)
        return assign(scores_TE, self.solver)[:, None]


def assign(scores_TE: Tensor, solver: str = "auction") -> Tensor:
    """expert_T of a balanced assignment: T / E tokens each, at most ceil(T / E) when E does not divide T. Infinite scores are the worst."""
    tokens, experts = scores_TE.shape
    scores_TE = scores_TE.detach().double()
    finite = scores_TE.isfinite()
    scores_TE = torch.where(finite, scores_TE, scores_TE[finite].min() if bool(finite.any()) else 0.0)
    padded = nn.functional.pad(scores_TE, (0, 0, 0, -tokens % experts))
    found = auction(padded) if solver == "auction" else None
    return (exact(padded) if found is None else found)[:tokens]


def exact(scores_TE: Tensor) -> Tensor:
    """The assignment of the largest total score, by the Hungarian method on T x T."""
    from scipy.optimize import linear_sum_assignment

    each = scores_TE.shape[0] // scores_TE.shape[1]
    _, seat_T = linear_sum_assignment(scores_TE.repeat_interleave(each, 1).numpy(force=True), maximize=True)
    return torch.as_tensor(seat_T // each, device=scores_TE.device)


def auction(scores_TE: Tensor, *, held_rounds: int = 100) -> Tensor | None:
    """The assignment by auction. After `held_rounds` bidders no longer keep what they hold, which ends soon but not at the best.

    None when it does not end within 5000 rounds.
    """
    scores_ET = scores_TE.t().contiguous()
    experts, tokens = scores_ET.shape
    each = tokens // experts
    if experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores_TE.device)
    epsilon = max(float(scores_ET.max() - scores_ET.min()) / 50, 1e-4)
    above = float(scores_ET.max()) + 1.0  # a token that is held stays among the most valuable
    cost_T, value_ET = torch.zeros_like(scores_ET[0]), scores_ET
    holder_T, held_T = None, None
    for step in range(_MOST_ROUNDS):
        top = value_ET.topk(each + 1, 1)
        bids_ET = torch.zeros_like(scores_ET)
        bids_ET.scatter_(1, top.indices[:, :each], top.values[:, :each] - top.values[:, each:] + epsilon)
        if holder_T is not None and held_T is not None:
            bids_ET[holder_T[held_T], held_T] = epsilon
        highest_T, bidder_T = bids_ET.max(0)
        if bool((highest_T > 0).all()):
            return bidder_T
        cost_T = cost_T + highest_T
        value_ET = scores_ET - cost_T
        holder_T = None
        if step + 1 < held_rounds:
            holder_T, held_T = bidder_T, (highest_T > 0).nonzero()[:, 0]
            value_ET[holder_T[held_T], held_T] = above
    return None


@method(
    "layers.routers.base",
    kind="router",
    fidelity="faithful",
    paper="2103.16716",
    traits=("batch-in-training", "causal-in-training"),
)
def base(site: Site, *, solver: str = "auction", gain: float = 0.1) -> StagedRouter:
    """solver: 'auction', or 'exact' for small batches (cubic in the tokens). gain: initial norm of the centroids."""
    require(solver in SOLVERS, f"solver {solver!r}", " or ".join(SOLVERS))
    return StagedRouter(score=Centroids(site, gain), normalise=identity, select=BalancedOne(solver), combine=Combine("sigmoid"))
