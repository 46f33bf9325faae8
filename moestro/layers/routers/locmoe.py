"""LocMoE: a gate without parameters, experts near the token preferred, and a lower bound on capacity.

Paper      Li et al. 2024, arXiv 2401.13920
Idea       Means of feature groups are orthogonal gates for free; traffic between nodes is kept low by a loss that pulls each node's tokens to
           the experts it holds.
Rule       z_e = mean of the e-th of E contiguous feature groups; p = softmax(ReLU z); e* = argmax p; g = p of e*, times scale
           loss = alpha E sum_e f_e P_e + mu mean over nodes of KL(D_c || D_l); D_c: mean p of the node's tokens; D_l: near 1 on the node's experts
           C = max(factor T / E, 1 / (E P(cosine > delta))) in training, in token order
Needs      d_model a multiple of E. A token's node: ctx.carry["node_T"] where given, else its process of a data-parallel run, else its
           sequence modulo the nodes
Gives      a router with balance and locality losses and capacity
Departs    D_l is 1 - far on the node's experts evenly, plus far over all evenly, as its zeros would make the divergence infinite; mu is ours.
           Tokens whose groups are all negative tie, and the largest mean decides. Evaluation drops nothing. Traits: relabel, an expert is a
           feature group; gradient, nothing to learn, only features move; batch-in-training, tokens compete for places
Checked    the gates' rows are constant and orthogonal, with square length E / D; locality loss 0 for local mass only; the bound against sampling
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.losses.balance import Balance
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine
from moestro.layers.taps.capacity import Capacity


class GroupMeans:
    """logits_TE: the mean of each feature group, plus noise in training."""

    def __init__(self, experts: int, noise: float) -> None:
        self.experts, self.noise = experts, noise

    def __call__(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        means_TE = x_TD.unflatten(-1, (self.experts, -1)).mean(-1)
        if ctx.training and self.noise:
            drawn = torch.randn(means_TE.shape, generator=ctx.rng, device=x_TD.device)
            return means_TE + self.noise * drawn
        return means_TE


def rectified(logits_TE: Tensor, ctx: RouteContext) -> Tensor:
    """softmax(ReLU z); leaves z in ctx.notes, to break ties."""
    ctx.notes["means_TE"] = logits_TE.detach()
    return logits_TE.relu().softmax(-1)


def largest(scores_TE: Tensor, ctx: RouteContext) -> Tensor:
    """The best expert; among equals the one with the largest mean."""
    tied_TE = scores_TE == scores_TE.amax(-1, keepdim=True)
    return ctx.notes["means_TE"].masked_fill(~tied_TE, float("-inf")).argmax(-1, keepdim=True)


class Locality(nn.Module):
    """mu times the divergence of each node's mean distribution from the local one, averaged over the nodes that have tokens."""

    def __init__(self, site: Site, weight: Scheduled, nodes: int, far: float) -> None:
        super().__init__()
        self.weight, self.nodes = read(weight), nodes
        local_NE = torch.eye(nodes).repeat_interleave(site.num_experts // nodes, 1)
        near_NE = (1 - far) * local_NE / local_NE.sum(1, keepdim=True) + far / site.num_experts
        self.register_buffer("near_NE", near_NE, persistent=False)

    def forward(self, decision: Decision) -> Tensor:
        node_T = node_of(decision.ctx, decision.x_TD.shape[0], self.nodes)
        sums_NE = decision.probs_TE.new_zeros(self.nodes, decision.num_experts).index_add(0, node_T, decision.probs_TE)
        there_N = torch.bincount(node_T, minlength=self.nodes)
        mean_NE = sums_NE / there_N.clamp_min(1)[:, None]
        return value_at(self.weight, decision.ctx.step) * divergence(mean_NE[there_N > 0], self.near_NE[there_N > 0]).mean()  # type: ignore[index]


def divergence(mean_NE: Tensor, near_NE: Tensor) -> Tensor:
    """KL(mean || near) of each row, in nats."""
    return (torch.special.xlogy(mean_NE, mean_NE.clamp_min(1e-30)) - mean_NE * near_NE.log()).sum(-1)


def node_of(ctx: RouteContext, tokens: int, nodes: int) -> Tensor:
    """node_T of each token, see the header."""
    if "node_T" in ctx.carry:
        return torch.as_tensor(ctx.carry["node_T"])
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return torch.full((tokens,), distributed.get_rank() % nodes)
    return torch.zeros(tokens, dtype=torch.int64) if ctx.sequence_T is None else torch.as_tensor(ctx.sequence_T) % nodes


def least_capacity(experts: int, width: int, delta: float) -> float:
    """1 / (E P): P is the probability that a random direction of `width` dimensions has a cosine above `delta` in size with a given one."""
    from scipy.special import betainc

    return 1.0 / (experts * float(1.0 - betainc(0.5, (width - 1) / 2, delta**2)))


class BoundedCapacity(Capacity):
    """Capacity that is never below the bound."""

    def __init__(self, site: Site, factor: float, delta: float) -> None:
        super().__init__(site, factor, 0.0, order="token")
        self.least = math.ceil(least_capacity(site.num_experts, site.d_model, delta))

    def limit(self, routing: Routing, training: bool) -> int:
        limit = super().limit(routing, training)
        return limit if limit < 0 else max(limit, self.least)


@method(
    "layers.routers.locmoe",
    kind="router",
    fidelity="adapted",
    paper="2401.13920",
    traits=("relabel", "gradient", "batch-in-training"),
)
def locmoe(
    site: Site,
    *,
    nodes: int = 2,
    locality: Scheduled = 0.01,
    balance: Scheduled = 0.01,
    capacity: float = 1.1,
    delta: float = 0.03,
    far: float = 0.01,
    noise: float = 0.0,
    scale: float = 1.0,
) -> StagedRouter:
    """nodes: that hold equal contiguous shares of the experts. locality: mu. capacity: factor, 0 no limit; delta: of the bound. noise: its
    standard deviation. scale: of the weights, as p is near 1 / E for normalised inputs."""
    e, d = site.num_experts, site.d_model
    require(d % e == 0, f"{e} experts, special ones included, for width {d}", "a divisor of the width")
    require(nodes >= 1 and e % nodes == 0, f"{nodes} nodes for {e} experts", "a divisor of the experts")
    require(
        0 <= delta < 1 and 0 < far <= 1 and noise >= 0, f"delta {delta}, far {far}, noise {noise}", "0 to 1; above 0; 0 or more"
    )
    return StagedRouter(
        score=GroupMeans(e, noise),
        normalise=rectified,
        select=largest,
        combine=Combine("raw", scale),
        taps=[BoundedCapacity(site, capacity, delta)],
        losses={"balance": Balance(site, balance), "locality": Locality(site, locality, nodes, far)},
    )
