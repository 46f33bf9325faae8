"""Pool balance: experts that layers share should be used evenly by all layers together.

Paper      UniPool, 2026, arXiv 2605.06665
Idea       An expert of a common pool may be idle in one layer if others use it, so the count is taken over all layers.
Rule       weight * E * sum_e F_e P_e / L in each of L layers; P_e = mean_t s_te of this layer; F_e = mean over the layers of c_e / sum c in
           the micro-batch before, without gradient; 0 in the very first
Needs      the choice before drops, probs; layers that share their pool (architectures `unipool`, `rexmoe`)
Gives      a scalar per layer; the counts are saved buffers
Departs    F counts the tokens of all ranks; the paper's code says nothing of ranks
Checked    uniform F gives weight sum P; F is the last micro-batch's; the closed form over two layers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.reduce import counts, sum_over_ranks
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site


class Usage(nn.Module):
    """Counts of the micro-batch before, and of this one as far as it is: one module of all layers of a pool."""

    before_E: Tensor
    now_E: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("before_E", torch.zeros(num_experts))
        self.register_buffer("now_E", torch.zeros(num_experts))

    @torch.no_grad()
    def turn(self) -> None:
        """A new micro-batch begins."""
        self.before_E.copy_(self.now_E)
        self.now_E.zero_()


class PoolBalance(nn.Module):
    """See the file's header."""

    def __init__(self, site: Site, weight: Scheduled) -> None:
        super().__init__()
        self.weight, self.layers = read(weight), site.layers
        self.usage: Usage = site.shared("pool_usage", lambda: Usage(site.num_experts))
        self.sharers = f"pool_usage {id(self.usage)}"  # what a pass has marked as begun

    def forward(self, decision: Decision) -> Tensor:
        if self.sharers not in decision.ctx.carry:
            decision.ctx.carry[self.sharers] = True
            self.usage.turn()
        probs_TE, usage = decision.probs_TE, self.usage
        with torch.no_grad():
            usage.now_E += sum_over_ranks(counts(decision.chosen.experts_TK, probs_TE.shape[1]))
        f_E = usage.before_E / usage.before_E.sum().clamp_min(1.0)
        return value_at(self.weight, decision.ctx.step) * probs_TE.shape[1] * (f_E * probs_TE.mean(0)).sum() / self.layers


@method("layers.losses.pool", kind="loss", fidelity="faithful", paper="2605.06665")
def pool(site: Site, *, weight: Scheduled = 0.01) -> PoolBalance:
    """Balance over all layers that share the site's pool."""
    return PoolBalance(site, weight)
