"""Global-batch balance: experts should be even over the whole step's tokens, not over each micro-batch.

Paper      Qiu et al. 2025, arXiv 2501.11873
Idea       A micro-batch is often of one domain; evening it out forbids experts of a domain. Counts of the whole batch allow them.
Rule       weight E sum_e f_e P_e with f from all micro-batches so far of the step on all ranks, P of this micro-batch;
           plus local weight E sum_e f_e P_e with f of this micro-batch (the paper adds about 1 %)
Needs      the choice before drops, probs
Gives      a scalar
Departs    nothing: it is the balance loss with scope 'step' and, for the local part, 'micro'; the router's own balance loss is to be 0
Checked    mean gradient of synchronised parts = gradient of one large batch; equal parts: equal to the micro form; a specialised, globally
           even router has 1, its micro form E over the experts of a domain
"""

from __future__ import annotations

from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.losses.balance import Balance
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require


class GlobalBalance(nn.Module):
    """See the file's header."""

    def __init__(self, site: Site, weight: Scheduled, local: float, normalise: bool) -> None:
        super().__init__()
        self.whole = Balance(site, weight, scope="step", normalise=normalise)
        self.part = Balance(site, weight, normalise=normalise)
        self.local = local

    def forward(self, decision: Decision) -> Tensor:
        whole = self.whole(decision)
        return whole + self.local * self.part(decision) if self.local else whole


@method("layers.losses.global_balance", kind="loss", fidelity="faithful", paper="2501.11873")
def global_balance(site: Site, *, weight: Scheduled = 0.01, local: float = 0.0, normalise: bool = False) -> GlobalBalance:
    """local: weight of the micro-batch's form, as a share of `weight`. normalise: divide probs by their sum first (sigmoid gates)."""
    require(local >= 0, f"local {local}", "0 or more")
    return GlobalBalance(site, weight, local, normalise)
