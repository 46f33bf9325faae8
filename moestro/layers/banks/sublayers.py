"""Experts that are stacks: each is several residual feed-forward layers with their own norms.

Paper      Lewis et al. 2021, arXiv 2103.16716; Chi et al. 2022 and Xie et al. 2022 use the same experts
Idea       One routing decision buys a deep expert.
Rule       h_0 = x; h_i = h_{i-1} + W2_i act(W1_i norm_i(h_{i-1}) + b1_i) + b2_i; the expert's output is h_n - x, as the residual is the block's
Needs      d_expert and activation of the configuration; gated is not read
Gives      an expert bank; W2 and b2 start at zero, so that a layer starts as the identity
Departs    the last bias of a sublayer starts at zero too, which the released code leaves random
Checked    zero at the start; equal to the layers written out
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.experts import ExpertSpec
from moestro.core.method import method
from moestro.layers.dispatch import grouped_linear
from moestro.layers.experts import ACTIVATIONS, FFN, ExpertBank, per_row
from moestro.layers.site import Site, require


class Sublayers(ExpertBank):
    """E stacks of `depth` layers: norm_EnD scale and shift, up_EFD and down_EDF of each layer n, with biases."""

    def __init__(self, num: int, spec: ExpertSpec, depth: int, std: float) -> None:
        super().__init__()
        require(depth >= 1, f"{depth} sublayers", "at least 1")
        d, f = spec.d_model, spec.d_expert
        self.spec, self.depth = spec, depth
        self.kinds, self.costs = (FFN,) * num, (2 * d * f * depth,) * num
        self.up_nEFD = nn.ParameterList(torch.randn(num, f, d) * std for _ in range(depth))
        self.down_nEDF = nn.ParameterList(torch.zeros(num, d, f) for _ in range(depth))
        self.up_nEF = nn.ParameterList(torch.zeros(num, f) for _ in range(depth))
        self.down_nED = nn.ParameterList(torch.zeros(num, d) for _ in range(depth))
        self.scale_nED = nn.ParameterList(torch.ones(num, d) for _ in range(depth))
        self.shift_nED = nn.ParameterList(torch.zeros(num, d) for _ in range(depth))

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        added_ND = torch.zeros_like(x_ND)
        for n in range(self.depth):
            normed = nn.functional.layer_norm(x_ND + added_ND, (x_ND.shape[1],))
            normed = normed * per_row(self.scale_nED[n], starts) + per_row(self.shift_nED[n], starts)
            inner = grouped_linear(normed, self.up_nEFD[n], starts) + per_row(self.up_nEF[n], starts)
            inner = ACTIVATIONS[self.spec.activation](inner)
            added_ND = added_ND + grouped_linear(inner, self.down_nEDF[n], starts) + per_row(self.down_nED[n], starts)
        return added_ND


@method("layers.banks.sublayers", kind="experts", fidelity="faithful", paper="2103.16716")
def sublayers(site: Site, *, depth: int = 1, activation: str = "relu") -> Sublayers:
    """depth: layers in each expert."""
    require(activation in ACTIVATIONS, f"activation {activation!r}", "one of " + ", ".join(ACTIVATIONS))
    spec = ExpertSpec(site.d_model, site.d_expert, activation, False, True)
    return Sublayers(site.num_experts, spec, depth, site.init_std)
