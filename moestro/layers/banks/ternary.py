"""Ternary experts: weights of -1, 0 and 1 times one scale per matrix, trained through the rounding.

Paper      Ma et al. 2024, BitNet b1.58, arXiv 2402.17764
Idea       Experts are many and rarely used: store them in 1.58 bits. The full weights exist in training only.
Rule       s = mean |W|; W_q = s clip(round(W / s), -1, 1); forward with W_q, gradient to W as if W_q = W
Needs      d_expert, activation and gated of the configuration
Gives      a bank of E experts
Departs    activations are not rounded (the paper rounds them to 8 bits); one scale per expert and matrix
Checked    three values per matrix; gradient passes unchanged; weights() gives the rounded weights
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.experts import ExpertWeights
from moestro.core.method import method
from moestro.layers.dispatch import grouped_linear
from moestro.layers.experts import Stacked, activate, down_std, spec_at
from moestro.layers.site import Site, require


def ternary_of(weight_EXY: Tensor) -> Tensor:
    """The rounded weights, with the gradient of the identity."""
    scale = weight_EXY.detach().abs().mean((1, 2), keepdim=True).clamp_min(1e-8)
    rounded = (weight_EXY.detach() / scale).round().clamp(-1, 1) * scale
    return rounded + (weight_EXY - weight_EXY.detach())


class Ternary(Stacked):
    """Stacked experts whose weights are rounded in every pass."""

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        h = grouped_linear(x_ND, ternary_of(self.gate_up_EFD), starts)
        return grouped_linear(activate(h, self.spec), ternary_of(self.down_EDF), starts)

    def weights(self, e: int) -> ExpertWeights:
        """One expert's rounded weights."""
        with torch.no_grad():
            inner, outer = ternary_of(self.gate_up_EFD[e : e + 1])[0], ternary_of(self.down_EDF[e : e + 1])[0]
        f = self.spec.d_expert
        gate, up = (inner[:f], inner[f:]) if self.spec.gated else (None, inner)
        return ExpertWeights(gate, up, outer)


@method("layers.banks.ternary", kind="experts", fidelity="adapted", paper="2402.17764")
def ternary(site: Site) -> Ternary:
    """site.num_experts ternary experts."""
    spec = spec_at(site)
    require(not spec.bias, "ternary experts with biases", "bias false")
    return Ternary(site.num_experts, spec, std=site.init_std, down_std=down_std(site))
