"""Monet: n^2 tiny experts put together from 2 n halves, so many that each can be a single concept.

Paper      Park et al. 2024, arXiv 2412.04139
Idea       Expert (i, j) is made of half i and half j; sums over all pairs come apart into two einsums, so no pair is ever built.
Rule       per side s and head h: z = W x; zhat: batch norm over tokens and halves; i is kept if zhat_i >= min(max zhat, tau),
           tau = Phi^-1(1 - k/n); g = softmax of z over the kept. y = sum_h sum_ij g1_hi g2_hj E_ij(x), act relu^2
           horizontal: E_ij = V_j act(U_i x + a_i) + b_j        vertical: both maps are cut in halves, i gives the first, j the second:
           E_ij = [V11_i a1 + V12_i a2 + b1_i ; V21_j a1 + V22_j a2 + b2_j], a1 = act(U1_i x), a2 = act(U2_j x)
           uniform * -(mean_i ln mean_th g1 + the same of g2) / 2 + ambiguous * mean_th ((1 - max g1) + (1 - max g2)) / 2
Needs      d_expert is the width of one tiny expert; experts, router, num_experts and top_k of the configuration are not read
Gives      a block; every `groups`-th layer routes, the following use its gates. The routing names 2 n halves, weighted by the heads' mean
Departs    the losses are from memory of the paper. 1e-9 is added in the logarithm, for a half that nobody keeps. Trait causal-in-training: the
           norm's statistics are those of the batch, in evaluation they are running means. A pair (i, j) alone cannot be switched off
Checked    both decompositions against all n^2 experts one by one; gates sum to 1; about k kept; equal gates inside a group
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.experts import down_std
from moestro.layers.reduce import average_over_ranks
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import where

_CARRIED = "monet_gates"


class Gates(nn.Module):
    """The router: gates of both sides [2, T, H, n]."""

    def __init__(self, site: Site, n: int, k: float, heads: int) -> None:
        super().__init__()
        self.n, self.heads = n, heads
        self.tau = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * k / n, dtype=torch.float64)))
        self.maps = site.linear(2 * heads * n)
        self.norm = nn.BatchNorm1d(2 * heads, affine=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """gates_2THn, raw_T2Hn."""
        z = self.maps(x_TD.float()).view(len(x_TD), 2 * self.heads, self.n)
        normed = self.norm(z.detach()) if len(x_TD) * self.n > 1 or not self.training else z.detach()
        if self.training:
            average_over_ranks(self.norm.running_mean, self.norm.running_var)  # type: ignore[arg-type]
        kept = normed >= normed.amax(-1, keepdim=True).clamp_max(self.tau)
        gates = z.masked_fill(~kept, float("-inf")).softmax(-1)
        raw = z.unflatten(1, (2, self.heads))
        return gates.unflatten(1, (2, self.heads)).transpose(0, 1), raw

    def summary(self, gates: Tensor, raw: Tensor) -> Routing:
        """The choice over 2 n halves, heads taken together."""
        mass = gates.detach().mean(2).transpose(0, 1).flatten(1)
        experts = where(mass > 0, mass)
        weights = mass.gather(1, experts.clamp_min(0)).masked_fill(experts < 0, 0.0)
        return Routing(experts, weights, raw.detach().mean(2).flatten(1), mass)


def _relu2(x: Tensor) -> Tensor:
    return x.relu().square()


class Horizontal(nn.Module):
    """inner_nMD, inner_nM: U_i and a_i; outer_nDM, outer_nD: V_j and b_j."""

    def __init__(self, d: int, n: int, m: int, std: float, small: float) -> None:
        super().__init__()
        self.inner_nMD, self.inner_nM = nn.Parameter(torch.randn(n, m, d) * std), nn.Parameter(torch.zeros(n, m))
        self.outer_nDM, self.outer_nD = nn.Parameter(torch.randn(n, d, m) * small), nn.Parameter(torch.zeros(n, d))

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        a = _relu2(torch.einsum("td,nmd->tnm", x, self.inner_nMD) + self.inner_nM)
        mixed = torch.einsum("thi,tim->thm", g1, a)
        c = torch.einsum("thj,thm->tjm", g2, mixed)
        return torch.einsum("tjm,jdm->td", c, self.outer_nDM) + torch.einsum("thj,jd->td", g2, self.outer_nD)

    def one(self, x: Tensor, i: int, j: int) -> Tensor:
        """E_ij(x)."""
        return _relu2(x @ self.inner_nMD[i].t() + self.inner_nM[i]) @ self.outer_nDM[j].t() + self.outer_nD[j]


class Vertical(nn.Module):
    """Two banks of inner halves (s), and outer halves by the half of the output (o) and of the inner width (s)."""

    def __init__(self, d: int, n: int, m: int, std: float, small: float) -> None:
        super().__init__()
        require(d % 2 == 0 and m % 2 == 0, f"widths {d} and {m}", "even ones, for the vertical decomposition")
        self.inner_snMD, self.inner_snM = (
            nn.Parameter(torch.randn(2, n, m // 2, d) * std),
            nn.Parameter(torch.zeros(2, n, m // 2)),
        )
        self.outer_osnDM = nn.Parameter(torch.randn(2, 2, n, d // 2, m // 2) * small)
        self.outer_onD = nn.Parameter(torch.zeros(2, n, d // 2))

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
        a1, a2 = _relu2(torch.einsum("td,snmd->stnm", x, self.inner_snMD) + self.inner_snM[:, None])
        gates, parts = (g1, g2), (torch.einsum("thi,tim->thm", g1, a1), torch.einsum("thj,tjm->thm", g2, a2))
        halves = []
        for o in (0, 1):
            # Of its own side the output half meets each inner half in its place; of the other side, their gated sum.
            terms = [(a1, a2)[s] * gates[s].sum(1)[..., None] if s == o else self._spread(gates[o], parts[s]) for s in (0, 1)]
            y = sum(torch.einsum("tnm,ndm->td", term, self.outer_osnDM[o, s]) for s, term in enumerate(terms))
            halves.append(y + torch.einsum("thn,nd->td", gates[o], self.outer_onD[o]))
        return torch.cat(halves, -1)

    @staticmethod
    def _spread(gates: Tensor, part: Tensor) -> Tensor:
        return torch.einsum("thn,thm->tnm", gates, part)

    def one(self, x: Tensor, i: int, j: int) -> Tensor:
        """E_ij(x)."""
        a = [_relu2(x @ self.inner_snMD[s, e].t() + self.inner_snM[s, e]) for s, e in ((0, i), (1, j))]
        out = [sum(a[s] @ self.outer_osnDM[o, s, e].t() for s in (0, 1)) + self.outer_onD[o, e] for o, e in ((0, i), (1, j))]
        return torch.cat(out, -1)


class Monet(nn.Module):
    """gates: None in layers that use those of the layer before."""

    def __init__(self, gates: Gates | None, experts: nn.Module, uniform: Scheduled, ambiguous: Scheduled) -> None:
        super().__init__()
        self.gates, self.experts = gates, experts
        self.uniform, self.ambiguous = read(uniform), read(ambiguous)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> BlockOutput:
        if self.gates is None:
            g1, g2 = ctx.carry[_CARRIED]
            return BlockOutput(self.experts(x_TD, g1.to(x_TD.dtype), g2.to(x_TD.dtype)))
        (g1, g2), raw = self.gates(x_TD)
        ctx.carry[_CARRIED] = (g1, g2)
        both = torch.stack((g1, g2))
        losses = {}
        if ctx.training and len(x_TD):
            use = -(both.mean((1, 2)) + 1e-9).log().mean()
            sure = (1 - both.amax(-1)).mean()
            losses = {
                "uniform": value_at(self.uniform, ctx.step) * use,
                "ambiguous": value_at(self.ambiguous, ctx.step) * sure,
            }
        y_TD = self.experts(x_TD, g1.to(x_TD.dtype), g2.to(x_TD.dtype))
        return BlockOutput(y_TD, (self.gates.summary(both, raw),), losses)


@method("layers.blocks.monet", kind="block", fidelity="adapted", paper="2412.04139", traits=("causal-in-training",))
def monet(
    site: Site,
    *,
    n: int = 32,
    k: float = 4.0,
    heads: int = 4,
    groups: int = 4,
    decomposition: str = "vertical",
    uniform: Scheduled = 1e-3,
    ambiguous: Scheduled = 1e-3,
) -> Monet:
    """n: halves per side (paper 512). k: kept of them on average (32 of 512). heads: paper 8. groups: layers that use one router."""
    require(1 <= k < n, f"k {k} of n {n} halves", f"1 to less than {n}")
    require(heads >= 1 and groups >= 1, f"{heads} heads, groups of {groups}", "at least 1 each")
    made = {"horizontal": Horizontal, "vertical": Vertical}
    require(decomposition in made, f"decomposition {decomposition!r}", "horizontal or vertical")
    experts = made[decomposition](site.d_model, n, site.d_expert, site.init_std, down_std(site))
    gates = None if site.layer % groups else Gates(site, n, k, heads)
    return Monet(gates, experts, uniform, ambiguous)
