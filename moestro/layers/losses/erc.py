"""ERC: a router row, taken as a token, must excite its own expert most.

Paper      Lv et al. 2025, arXiv 2512.23447
Idea       A router that does not know its experts sends tokens astray. E proxy tokens through E first projections tie the two, at a cost
           that does not depend on the batch.
Rule       eps_i = min_{j != i} |R_i - R_j| / (2 |R_i|); Rt_i = R_i * delta, delta ~ U(1 - eps_i, 1 + eps_i) per entry; M_ij = |Rt_i Wg_j|
           weight / E^2 sum_i sum_{j != i} max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0), the mean over layers
Needs      a linear gate; stacked experts (the gate projection, or the only one of experts without a gate)
Gives      a scalar; 0 when every row and column of M has its largest entry on the diagonal (alpha 1)
Departs    special experts (zero, copy) take no part. The weight of 1 is not confirmed
Checked    written out; 0 for orthonormal rows and rank-one experts; the noise stays within half the distance to the nearest row
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.experts import Joined, Stacked
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require


class Coupling(nn.Module):
    """See the file's header."""

    def __init__(self, site: Site, weight: Scheduled, alpha: float, noise: bool) -> None:
        super().__init__()
        bank = site.bank()
        stack = bank.banks[0] if isinstance(bank, Joined) else bank
        if not isinstance(stack, Stacked):
            raise InputError(f"the erc loss with experts of type {type(stack).__name__}", expected="stacked experts")
        require(stack.num >= 2, f"the erc loss with {stack.num} expert", "at least 2")
        self.weight, self.alpha, self.noise, self.layers = read(weight), alpha, noise, site.layers
        self._stack = (stack,)  # a tuple: the experts are the block's, not this module's

    def forward(self, decision: Decision) -> Tensor:
        rows_ED = decision.ctx.notes.get("rows_ED")
        if rows_ED is None:
            raise InputError("the erc loss with a router without a linear gate", expected="a router such as topk or switch")
        (stack,) = self._stack
        rows_ED = rows_ED[: stack.num]
        proxies_ED = perturbed(rows_ED, decision.ctx) if self.noise else rows_ED
        first = stack.gate_up_EFD[:, : stack.spec.d_expert].float()
        reach_EE = (proxies_ED @ first.flatten(0, 1).t()).unflatten(1, (stack.num, -1)).norm(dim=-1)
        return value_at(self.weight, decision.ctx.step) / self.layers * coupling(reach_EE, self.alpha)


def coupling(reach_EE: Tensor, alpha: float) -> Tensor:
    """The loss of M: what off-diagonal entries exceed alpha times the diagonal of their row, and of their column."""
    own = alpha * reach_EE.diagonal()
    over = (reach_EE - own[:, None]).relu() + (reach_EE - own[None, :]).relu()
    return (over - torch.diag(over.diagonal())).sum() / reach_EE.numel()


def bounds(rows_ED: Tensor) -> Tensor:
    """eps_E: half the distance to the nearest other row, over the row's length."""
    rows_ED = rows_ED.detach()
    apart = (rows_ED[:, None] - rows_ED[None]).norm(dim=-1).fill_diagonal_(float("inf"))
    return apart.min(1).values / (2 * rows_ED.norm(dim=1)).clamp_min(1e-20)


def perturbed(rows_ED: Tensor, ctx: RouteContext) -> Tensor:
    """Each row times uniform noise within its bound."""
    drawn = torch.rand(rows_ED.shape, generator=ctx.rng, device=rows_ED.device)
    return rows_ED * (1 + bounds(rows_ED)[:, None] * (2 * drawn - 1))


@method("layers.losses.erc", kind="loss", fidelity="faithful", paper="2512.23447")
def erc(site: Site, *, weight: Scheduled = 1.0, alpha: float = 1.0, noise: bool = True) -> Coupling:
    """alpha: how far others may come near the diagonal, 0.5 for many experts. noise: perturb the rows, as the paper found needed."""
    require(alpha >= 0, f"alpha {alpha}", "0 or more")
    return Coupling(site, weight, alpha, noise)
