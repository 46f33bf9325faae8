"""Importance loss: every expert should get the same sum of gate weights.

Paper      Shazeer et al. 2017, arXiv 1701.06538
Idea       The squared coefficient of variation of the weights' sums is zero when experts matter equally.
Rule       weight * var_e(I) / mean_e(I)^2, I_e = sum_t g_te over the chosen; population variance
Needs      the choice before drops and its weights
Gives      a scalar
Departs    nothing
Checked    0 for equal sums; E - 1 when one expert has all the weight
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site


def squared_variation(values_E: Tensor) -> Tensor:
    """var / mean^2, population variance; 0 when all are zero."""
    mean = values_E.mean()
    return (values_E - mean).square().mean() / mean.square().clamp_min(1e-10)


def importance(decision: Decision) -> Tensor:
    """sums_E of the chosen experts' combine weights."""
    ids, weights = decision.chosen.experts_TK.reshape(-1), decision.chosen.weights_TK.reshape(-1)
    return weights.new_zeros(decision.num_experts + 1).index_add(0, ids + 1, weights)[1:]


class Importance(nn.Module):
    """See the file's header."""

    def __init__(self, weight: Scheduled) -> None:
        super().__init__()
        self.weight = read(weight)

    def forward(self, decision: Decision) -> Tensor:
        return value_at(self.weight, decision.ctx.step) * squared_variation(importance(decision))


@method("layers.losses.importance", kind="loss", fidelity="exact", paper="1701.06538")
def importance_loss(site: Site, *, weight: Scheduled = 0.1) -> Importance:
    """The squared coefficient of variation of the experts' importance."""
    return Importance(weight)
