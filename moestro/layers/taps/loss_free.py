"""Loss-free balancing: a bias on the choice, moved against the load after each step.

Paper      Wang et al. 2024, arXiv 2408.15664
Idea       A controller balances what a loss would balance with a gradient that disturbs the model's own.
Rule       select by s + b; weights from s; after a step b_e += u sign(mean c - c_e), c over the whole global batch
Needs      the routings of all micro-batches of a step
Gives      a tap on the choice, and a controller
Departs    nothing. mode 'proportional' is the paper's variant u (mean c - c_e) / mean c
Checked    b has no gradient; equal loads leave it; each change is exactly u or 0; b = 0 is the plain router
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.block import Output
from moestro.layers.reduce import counts, sum_over_ranks
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require


class LossFree(nn.Module):
    """The tap and its controller; bias_E is a saved buffer."""

    point = "choice"
    bias_E: Tensor

    def __init__(self, site: Site, rate: Scheduled, mode: str = "sign") -> None:
        super().__init__()
        require(mode in ("sign", "proportional"), f"mode {mode!r}", "sign or proportional")
        self.layer, self.rate, self.mode = site.layer, read(rate), mode
        self.register_buffer("bias_E", torch.zeros(site.num_experts))

    def forward(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return scores_TE + self.bias_E

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Output], step: int) -> None:
        """Move the bias by the counts of all micro-batches and ranks, as the experts got them."""
        total = torch.zeros_like(self.bias_E)
        for output in outputs:
            total += counts(output.routings[self.layer].experts_TK, total.numel())
        total = sum_over_ranks(total)
        lack = total.mean() - total
        change = lack.sign() if self.mode == "sign" else lack / total.mean().clamp_min(1.0)
        self.bias_E += value_at(self.rate, step) * change


@method("layers.taps.loss_free", kind="tap", fidelity="exact", paper="2408.15664")
def loss_free(site: Site, *, rate: Scheduled = 0.001, mode: str = "sign") -> LossFree:
    """rate: u. The paper's 0.001 is for long runs; 0.005 to 0.02 balances within a few thousand steps."""
    return LossFree(site, rate, mode)
