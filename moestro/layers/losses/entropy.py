"""Router entropy: make the router sure of each token, or, with a negative weight, keep it open.

Paper      Huang et al. 2024, arXiv 2403.07652 (minimised, for top-p routing)
Idea       A flat distribution would select many experts; small entropy selects few.
Rule       weight * mean_t -sum_e p_te ln p_te
Needs      probs
Gives      a scalar in nats times weight
Departs    nothing
Checked    ln E for uniform probs, 0 for one-hot
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site


class Entropy(nn.Module):
    """See the file's header."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        probs = decision.probs_TE
        # xlogy: 0 ln 0 = 0, and the clamp keeps its gradient finite.
        entropy = -torch.special.xlogy(probs, probs.clamp_min(1e-30)).sum()
        return value_at(self.weight, decision.ctx.step) * entropy / probs.shape[0]


@method("layers.losses.entropy", kind="loss", fidelity="exact", paper="2403.07652")
def entropy_loss(site: Site, *, weight: Scheduled = 1e-4) -> Entropy:
    """The mean entropy of the router's distribution."""
    return Entropy(weight)
