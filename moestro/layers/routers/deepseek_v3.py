"""DeepSeek-V3's gate: sigmoid scores, a balancing bias on the choice, and a limit on the groups a token may touch.

Paper      DeepSeek-AI 2024, arXiv 2412.19437; arXiv 2505.09343
Idea       Groups are nodes: fewer groups mean less traffic. A bias balances without a loss and never enters the weights.
Rule       s = sigmoid(x W^T); s' = s + b; a group scores the sum of its two best s'; the best groups stay, others -inf;
           S = the k best s'; g = s / sum over S of s, times scale; after each step b_e += rate sign(mean c - c_e)
           plus a small balance loss per sequence, on s / sum s
Needs      the routings of a step (controller)
Gives      a router, tap and controller
Departs    nothing
Checked    equal to transformers' gate; never more groups than allowed; all groups is plain top-k of s'
"""

from __future__ import annotations

from torch import Tensor

from moestro.core.method import method
from moestro.core.routing import RouteContext, Tap
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK, sigmoid
from moestro.layers.taps.loss_free import LossFree


class GroupLimit:
    """A tap on the choice: only the `kept` groups with the largest sum of two best scores stay."""

    def __init__(self, groups: int, kept: int) -> None:
        self.groups, self.kept = groups, kept

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        grouped = scores_TE.unflatten(-1, (self.groups, -1))
        group_TG = grouped.topk(2, -1).values.sum(-1)
        out = group_TG.new_ones(group_TG.shape).scatter(-1, group_TG.topk(self.kept, -1).indices, 0.0).bool()
        return grouped.masked_fill(out[..., None], float("-inf")).flatten(-2)


@method("layers.routers.deepseek_v3", kind="router", fidelity="exact", paper="2412.19437")
def deepseek_v3(
    site: Site,
    *,
    groups: int = 1,
    kept: int = 1,
    scale: float = 2.5,
    rate: Scheduled = 0.001,
    balance: Scheduled = 1e-4,
) -> StagedRouter:
    """groups, kept: node limit, 1 and 1: none. scale: of the weights. rate: of the bias. balance: of the loss per sequence."""
    e = site.num_experts
    require(groups >= 1 and e % groups == 0, f"{groups} groups of {e} experts", "a divisor of the experts")
    require(1 <= kept <= groups, f"{kept} of {groups} groups kept", f"1 to {groups}")
    require(groups == 1 or e // groups >= 2, f"groups of {e // groups} expert", "at least 2, as a group scores its two best")
    require(site.top_k <= kept * (e // groups), f"top_k {site.top_k} of {kept} groups of {e // groups}", "no more than they hold")
    return StagedRouter(
        score=Linear(site),
        normalise=sigmoid,
        select=TopK(site.top_k),
        combine=Combine("renormalised", scale),
        taps=[LossFree(site, rate), *([Tap("choice", GroupLimit(groups, kept))] if groups > 1 else [])],
        losses={"balance": Balance(site, balance, scope="sequence", normalise=True)},
    )
