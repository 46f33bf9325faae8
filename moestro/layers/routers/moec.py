"""MoEC: experts in clusters whose members are routed alike, and dropped in turns.

Paper      Xie et al. 2022, arXiv 2207.09094
Idea       Many experts see too few tokens each. Clusters share tokens: probabilities are pulled together inside a cluster and apart
           between clusters, and experts dropped at random teach their neighbours.
Rule       z = cos(W x, e) / tau; p = softmax z; top-1, raw p; C = ceil(factor T / survivors)
           loss = mu mean_t V_intra / (V_inter + eps) + balance; V_intra: mean over clusters of the variance of p inside, V_inter: variance
           of the clusters' means. Every `interval` steps the survivors are drawn: (1 - drop) of each cluster, at least one;
           training chooses among survivors, evaluation among all
Needs      nothing; top_k of the configuration is not read: it is 1. The paper's experts are the bank `sublayers`
Gives      a router with balance and cluster losses, and a controller; the survivors are a saved buffer
Departs    the form of the cluster loss is inferred; form 'difference' is V_intra - V_inter. Neither form asks for different clusters for
           different tokens: in short runs of 60 steps 'difference' sent all tokens to one expert, 'ratio' did so early and recovered
           in one of two, so watch MaxVio and raise `balance`. mu is the paper's, for its own form. The temperature is learned and its
           start is ours. Evaluation drops nothing. Clusters are 8 of 8 experts in the paper. Traits: relabel, clusters are
           contiguous; batch-in-training, tokens compete for places
Checked    dropped experts get no token and no gradient; a survivor in each cluster; 0 for p constant in clusters; drop 0 is the plain gate
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import Output
from moestro.layers.losses.balance import Balance
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax
from moestro.layers.taps.capacity import Capacity

FORMS = ("ratio", "difference")


class Cosine(nn.Module):
    """logits = cosine of the projected token and each expert's embedding, over a learned temperature."""

    def __init__(self, site: Site, width: int, temperature: float) -> None:
        super().__init__()
        self.project = site.linear(width)
        self.embedding_EW = nn.Parameter(torch.randn(site.num_experts, width))
        self.log_temperature = nn.Parameter(torch.tensor(temperature).log())

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        token = nn.functional.normalize(self.project(x_TD), dim=-1)
        cosine_TE = token @ nn.functional.normalize(self.embedding_EW.float(), dim=-1).t()
        return cosine_TE / self.log_temperature.exp().clamp_min(0.01)


class Survivors(nn.Module):
    """A tap on the choice: in training only survivors are chosen. As a controller it draws them anew, the same on every rank."""

    point = "choice"
    alive_E: Tensor

    def __init__(self, site: Site, clusters: int, drop: float, interval: int, seed: int) -> None:
        super().__init__()
        self.clusters, self.interval, self.seed, self.layer = clusters, interval, seed, site.layer
        self.size = site.num_experts // clusters
        self.kept = max(1, int((1 - drop) * self.size))
        self.register_buffer("alive_E", torch.ones(site.num_experts, dtype=torch.bool))
        self._draw(0)

    def forward(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE.masked_fill(~self.alive_E, float("-inf")) if ctx.training else scores_TE

    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        """Draw survivors after each `interval` steps."""
        if (step + 1) % self.interval == 0:
            self._draw((step + 1) // self.interval)

    def _draw(self, turn: int) -> None:
        g = torch.Generator().manual_seed((self.seed * 1009 + self.layer) * 1_000_003 + turn)
        keys = torch.rand(self.clusters, self.size, generator=g)
        alive = torch.zeros(self.clusters, self.size, dtype=torch.bool).scatter_(1, keys.topk(self.kept, 1).indices, True)
        self.alive_E.copy_(alive.flatten())


class Clustering(nn.Module):
    """The cluster loss."""

    def __init__(self, clusters: int, weight: Scheduled, form: str, eps: float) -> None:
        super().__init__()
        self.clusters, self.weight, self.form, self.eps = clusters, read(weight), form, eps

    def forward(self, decision: Decision) -> Tensor:
        inside, between = variances(decision.probs_TE, self.clusters)
        value = inside / (between + self.eps) if self.form == "ratio" else inside - between
        return value_at(self.weight, decision.ctx.step) * value.mean()


def variances(probs_TE: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(V_intra_T, V_inter_T) of contiguous clusters; population variances."""
    grouped = probs_TE.unflatten(-1, (clusters, -1))
    return grouped.var(-1, unbiased=False).mean(-1), grouped.mean(-1).var(-1, unbiased=False)


@method(
    "layers.routers.moec",
    kind="router",
    fidelity="adapted",
    paper="2207.09094",
    traits=("relabel", "batch-in-training"),
)
def moec(
    site: Site,
    *,
    clusters: int = 4,
    drop: float = 0.5,
    interval: int = 250,
    cluster: Scheduled = 1.0,
    form: str = "ratio",
    eps: float = 1e-3,
    width: int = 32,
    temperature: float = 0.3,
    capacity: float = 2.0,
    balance: Scheduled = 0.01,
    seed: int = 0,
) -> StagedRouter:
    """drop: gamma, share of each cluster that is dropped. cluster: mu; form, eps: of its loss. width: of the gate. seed: of survivors."""
    e = site.num_experts
    require(clusters >= 1 and e % clusters == 0, f"{clusters} clusters of {e} experts", "a divisor of the experts")
    require(0 <= drop < 1 and interval >= 1, f"drop {drop} every {interval} steps", "0 to below 1, at least 1")
    require(form in FORMS, f"form {form!r}", " or ".join(FORMS))
    require(width >= 1 and temperature > 0, f"width {width}, temperature {temperature}", "at least 1 and above 0")
    survivors = Survivors(site, clusters, drop, interval, seed)
    share = e / (survivors.kept * clusters)
    return StagedRouter(
        score=Cosine(site, width, temperature),
        normalise=softmax,
        select=TopK(1),
        combine=Combine("raw"),
        taps=[survivors, Capacity(site, capacity * share, 0.0)],
        losses={"balance": Balance(site, balance), "cluster": Clustering(clusters, cluster, form, eps)},
    )
