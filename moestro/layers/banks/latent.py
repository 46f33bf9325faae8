"""Latent experts: the input maps of a group of experts are small matrices on one shared projection.

Paper      Liu et al. 2025, MoLAE, arXiv 2503.23100
Idea       Experts of a group read the same few directions of x, so the wide part of their input maps is stored and computed once.
Rule       group g = e // size; y = W_down_e (silu(A_gate_e B_gate_g x) * (A_up_e B_up_g x)); B [m, D], A [F, m]; W_down is full
           from trained experts: the group's W stacked by rows is U S V^T; B = V_m^T, A = U_m S_m, the best for a common B (Eckart-Young)
Needs      d_expert, activation and gated of the configuration
Gives      a bank of E experts
Departs    m and the size of a group are not read from the paper: the defaults are D/2 and all experts. A projection that all experts
           share is computed once per token; that of several groups once per pair
Checked    equal to experts with A B multiplied out; conversion is exact where the rank allows, its error the discarded singular values'
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.method import method
from moestro.core.routing import Routing
from moestro.layers.dispatch import combine, gather, grouped_linear, order_of
from moestro.layers.experts import FFN, ExpertBank, Stacked, activate, down_std, spec_at
from moestro.layers.site import Site, require


def factor(rows_RD: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(a_Rm, b_mD) of the best approximation of rank `width`, computed in float64."""
    u, s, v = torch.linalg.svd(rows_RD.double(), full_matrices=False)
    return (u[:, :width] * s[:width]).to(rows_RD.dtype), v[:width].to(rows_RD.dtype)


class Latent(ExpertBank):
    """inner_GMD: the groups' projections, gate's rows first; own_EFM: each expert's maps from its halves of them; down_EDF."""

    def __init__(self, num: int, spec: ExpertSpec, width: int, group: int, std: float, small: float) -> None:
        super().__init__()
        require(1 <= width <= spec.d_model, f"latent width {width} of {spec.d_model}", f"1 to {spec.d_model}")
        require(group >= 1 and num % group == 0, f"groups of {group} of {num} experts", "a divisor")
        require(not spec.bias, "latent experts with biases", "bias false")
        d, f, self.parts = spec.d_model, spec.d_expert, 2 if spec.gated else 1
        self.spec, self.width, self.group, self.kinds = spec, width, group, (FFN,) * num
        self.costs = (self.parts * width * (d + f) + d * f,) * num
        self.inner_GMD = nn.Parameter(torch.randn(num // group, self.parts * width, d) * d**-0.5)
        self.own_EFM = nn.Parameter(torch.randn(num, self.parts * f, width) * std * (d / width) ** 0.5)
        self.down_EDF = nn.Parameter(torch.randn(num, d, f) * small)

    @torch.no_grad()
    def convert(self, bank: Stacked) -> Latent:
        """Take over trained experts, as well as this width can; returns itself."""
        f, m = self.spec.d_expert, self.width
        for g in range(self.inner_GMD.shape[0]):
            mine = slice(g * self.group, (g + 1) * self.group)
            for p in range(self.parts):
                maps = bank.gate_up_EFD[mine, p * f : (p + 1) * f]
                a, b = factor(maps.flatten(0, 1), m)
                self.inner_GMD[g, p * m : p * m + b.shape[0]] = b
                self.own_EFM[mine, p * f : (p + 1) * f, : a.shape[1]] = a.view(self.group, f, -1)
                self.own_EFM[mine, p * f : (p + 1) * f, a.shape[1] :] = 0
        self.down_EDF.copy_(bank.down_EDF)
        return self

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if self.inner_GMD.shape[0] > 1:
            return super().run(x_TD, routing)
        order = order_of(routing.experts_TK, self.num)
        if not order.starts[-1]:
            return super().run(x_TD, routing)
        latent = functional.linear(x_TD, self.inner_GMD[0].to(x_TD.dtype))
        return combine(self._rest(gather(latent, order), order.starts), routing, order)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        return self._rest(grouped_linear(x_ND, self.inner_GMD, starts[:: self.group]), starts)

    def _rest(self, latent_NM: Tensor, starts: list[int]) -> Tensor:
        maps = self.own_EFM.chunk(self.parts, 1)
        h = [grouped_linear(z, a, starts) for z, a in zip(latent_NM.chunk(self.parts, -1), maps, strict=True)]
        return grouped_linear(activate(torch.cat(h, -1), self.spec), self.down_EDF, starts)

    def weights(self, e: int) -> ExpertWeights:
        """The full matrices of one expert."""
        inner = self.inner_GMD[e // self.group].chunk(self.parts)
        full = [a @ b for a, b in zip(self.own_EFM[e].chunk(self.parts), inner, strict=True)]
        return ExpertWeights(full[0] if self.parts == 2 else None, full[-1], self.down_EDF[e])


@method("layers.banks.latent", kind="experts", fidelity="adapted", paper="2503.23100")
def latent(site: Site, *, width: int = 0, group: int = 0) -> Latent:
    """width: m, 0 for half the model's. group: experts that share a projection, 0 for all."""
    m, size = width or max(1, site.d_model // 2), group or site.num_experts
    return Latent(site.num_experts, spec_at(site), m, size, site.init_std, down_std(site))
