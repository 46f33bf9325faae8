"""Top-p: as few experts as reach a share of the probability, so that hard tokens get more.

Paper      Huang et al. 2024, arXiv 2403.07652
Idea       A sure router needs one expert; an unsure one takes more until their probabilities add up to p.
Rule       P = softmax(x W^T); S = the best experts up to and including the one with which their sum exceeds p; g = P of the chosen, raw
           loss = alpha E sum_e f_e P_e + beta mean_t H(P_t), f_e = c_e / T (sums to the mean number of experts)
Needs      nothing; top_k of the configuration is not read
Gives      a router with balance and entropy losses
Departs    nothing
Checked    the mass with and without the last member; p 0 is Switch's choice, p 1 the dense mixture
"""

from __future__ import annotations

from torch import Tensor

from moestro.core.method import method
from moestro.core.routing import EMPTY, RouteContext
from moestro.layers.losses.balance import Balance
from moestro.layers.losses.entropy import Entropy
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, softmax


class TopP:
    """The fewest experts whose scores sum to more than p; all at p = 1."""

    def __init__(self, p: Scheduled) -> None:
        self.p = read(p)

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        p = value_at(self.p, ctx.step)
        ranked, order = scores_TE.sort(dim=-1, descending=True, stable=True)
        mass = ranked.clamp_min(0.0)
        kept = (mass.cumsum(-1) - mass <= p) | (p >= 1)
        slots = int(kept.sum(1).max()) if kept.shape[0] else 0
        return order.masked_fill(~kept, EMPTY)[:, :slots]


@method("layers.routers.top_p", kind="router", fidelity="faithful", paper="2403.07652")
def top_p(site: Site, *, p: Scheduled = 0.4, balance: Scheduled = 0.01, entropy: Scheduled = 1e-4) -> StagedRouter:
    """p: the share of probability, 0 to 1. balance, entropy: alpha and beta; over a few thousand steps beta needs about 0.01."""
    kept = read(p)
    ends = (kept,) if isinstance(kept, int | float) else (kept.start, kept.end)
    require(all(0 <= end <= 1 for end in ends), f"p {p}", "0 to 1")
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopP(kept),
        combine=Combine("raw"),
        losses={"balance": Balance(site, balance, convention="tokens"), "entropy": Entropy(entropy)},
    )
