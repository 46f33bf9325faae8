"""Activation locality: a token should use the experts of the token before it.

Paper      Song et al. 2025, BlockFFN, arXiv 2507.08771
Idea       Experts that are read already are free: neighbours that agree need fewer.
Rule       loss = weight mean over neighbours and experts of BCE(sigmoid(A z_{t-1,e}), target sigmoid(A z_te)), averaged over the layers; z: the
           router's logits; A = 100 makes them nearly signs
Needs      logits around zero, as of a router whose support is where they are positive
Gives      a scalar; 0 for a batch without neighbours
Departs    nothing: the target carries a gradient too, as in the released code. The mean over the layers is our reading
Checked    near 0 for neighbours with the same clear signs, A |z| for opposite ones; sequences are not neighbours
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site


class Locality(nn.Module):
    """See the file's header."""

    def __init__(self, site: Site, weight: Scheduled, sharpness: float) -> None:
        super().__init__()
        self.weight, self.sharpness, self.layers = read(weight), sharpness, site.layers

    def forward(self, decision: Decision) -> Tensor:
        before_TE, now_TE = self.sharpness * decision.logits_TE[:-1], self.sharpness * decision.logits_TE[1:]
        if (sequence_T := decision.ctx.sequence_T) is not None:
            neighbours_T = torch.as_tensor(sequence_T)[1:] == torch.as_tensor(sequence_T)[:-1]
            before_TE, now_TE = before_TE[neighbours_T], now_TE[neighbours_T]
        if not len(now_TE):
            return decision.logits_TE.sum() * 0.0
        value = functional.binary_cross_entropy_with_logits(before_TE, now_TE.sigmoid())
        return value_at(self.weight, decision.ctx.step) / self.layers * value


@method("layers.losses.locality", kind="loss", fidelity="faithful", paper="2507.08771")
def locality(site: Site, *, weight: Scheduled = 0.002, sharpness: float = 100.0) -> Locality:
    """sharpness: A."""
    return Locality(site, weight, sharpness)
