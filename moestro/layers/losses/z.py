"""Router z-loss: keep the logits small.

Paper      Zoph et al. 2022, ST-MoE, arXiv 2202.08906
Idea       Large logits make the softmax's rounding errors large; penalise the log of its normaliser.
Rule       weight * mean_t (logsumexp_e z_te)^2, float32; the gradient of a token is 2 lse softmax(z)
Needs      logits
Gives      a scalar; (ln E)^2 at zero logits, smallest at logsumexp = 0
Departs    nothing; masked logits (-inf) do not count
Checked    value and gradient in closed form
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site


class ZLoss(nn.Module):
    """See the file's header."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        z = decision.logits_TE.logsumexp(-1)
        return value_at(self.weight, decision.ctx.step) * z.square().mean()


@method("layers.losses.z", kind="loss", fidelity="exact", paper="2202.08906")
def z_loss(site: Site, *, weight: Scheduled = 0.001) -> ZLoss:
    """The z-loss of one layer."""
    return ZLoss(weight)
