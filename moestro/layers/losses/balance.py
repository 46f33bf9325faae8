"""Balance loss: the product of how often and how surely each expert is chosen.

Paper      Fedus, Zoph, Shazeer 2021, arXiv 2101.03961; scopes: arXiv 2401.06066 (device), 2412.19437 (sequence), 2501.11873 (global)
Idea       The count f carries no gradient, the mean probability P does: probability is pushed away from experts that are used much.
           One function serves every count-based loss; they differ in the weight of each expert and in the tokens that f counts.
Rule       weight * E * sum_e w_e f_e P_e; f_e = c_e / sum c ('share', sums to 1) or c_e / T ('tokens', sums to the mean slots used)
           groups: E * sum_g mean_{e in g} f_e * sum_{e in g} P_e
Needs      the choice before drops, probs
Gives      a scalar; 1 x weight when f or P is uniform (share, w = 1, probs that sum to 1). It is not bounded below by 1
Departs    nothing
Checked    the closed form, by hand; equal scopes coincide; the mean gradient of synchronised parts is that of one large batch
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.layers.reduce import counts, sum_over_ranks
from moestro.layers.router import Decision
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require

SCOPES = ("micro", "sequence", "global", "step", "ema")
CONVENTIONS = ("share", "tokens")


def balance(f_E: Tensor, p_E: Tensor, weight_E: Tensor | None = None, groups: int = 0) -> Tensor:
    """E * sum_e w_e f_e P_e over the last dimension; with `groups`, of f's mean and P's sum over contiguous groups."""
    experts = f_E.shape[-1]
    weighed = f_E.detach() if weight_E is None else f_E.detach() * weight_E
    if groups:
        weighed = weighed.unflatten(-1, (groups, -1)).mean(-1)
        p_E = p_E.unflatten(-1, (groups, -1)).sum(-1)
    return experts * (weighed * p_E).sum(-1)


class Balance(nn.Module):
    """The loss as a module. weight_E: of each expert (sizes, costs), constant.

    scope: which tokens f counts: 'micro' this batch; 'sequence' each sequence alone, averaged; 'global' this batch on all ranks;
    'step' all micro-batches so far of this optimiser step, on all ranks; 'ema' a running mean over steps, on all ranks.
    """

    def __init__(
        self,
        site: Site,
        weight: Scheduled,
        *,
        scope: str = "micro",
        convention: str = "share",
        groups: int = 0,
        first_slot: bool = False,
        normalise: bool = False,
        decay: float = 0.9,
        weight_E: Tensor | None = None,
    ) -> None:
        super().__init__()
        require(scope in SCOPES, f"scope {scope!r}", "one of " + ", ".join(SCOPES))
        require(convention in CONVENTIONS, f"convention {convention!r}", "one of " + ", ".join(CONVENTIONS))
        require(not groups or site.num_experts % groups == 0, f"{groups} groups of {site.num_experts} experts", "a divisor")
        self.weight, self.scope, self.convention, self.groups = read(weight), scope, convention, groups
        self.first_slot, self.normalise, self.decay = first_slot, normalise, decay
        self.register_buffer("weight_E", weight_E)
        if scope in ("step", "ema"):
            self.register_buffer("count_E", torch.zeros(site.num_experts))
            self.register_buffer("tokens", torch.zeros(()))
            self.register_buffer("at", torch.full((), -1, dtype=torch.int64))

    def forward(self, decision: Decision) -> Tensor:
        experts_TK, probs_TE = decision.chosen.experts_TK, decision.probs_TE
        if self.first_slot:
            experts_TK = experts_TK[:, :1]
        if self.normalise:
            probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        weight = value_at(self.weight, decision.ctx.step)
        if self.scope == "sequence" and decision.ctx.sequence_T is not None:
            return weight * self._by_sequence(experts_TK, probs_TE, decision.ctx.sequence_T)
        count_E = counts(experts_TK, probs_TE.shape[1])
        f_E = self._frequency(*self._in_scope(count_E, float(experts_TK.shape[0]), decision.ctx.step))
        p_E = probs_TE.mean(0)
        return weight * balance(f_E, p_E, self.weight_E, self.groups)  # type: ignore[arg-type]

    def _frequency(self, count_E: Tensor, tokens: Tensor | float) -> Tensor:
        whole = count_E.sum(-1, keepdim=True) if self.convention == "share" else torch.as_tensor(tokens)
        return count_E / whole.clamp_min(1e-9)

    @torch.no_grad()
    def _in_scope(self, count_E: Tensor, tokens: float, step: int) -> tuple[Tensor, Tensor]:
        """Counts and tokens that f is made of; updates the buffers."""
        both = torch.cat((count_E, count_E.new_tensor([tokens])))
        if self.scope in ("global", "step", "ema"):
            both = sum_over_ranks(both)
        count_E, total = both[:-1], both[-1]
        if self.scope in ("micro", "sequence", "global"):
            return count_E, total
        if self.scope == "step":
            fresh = int(self.at) != step  # type: ignore[arg-type]
            count_E = count_E if fresh else self.count_E + count_E  # type: ignore[operator]
            total = total if fresh else self.tokens + total  # type: ignore[operator]
        elif int(self.at) >= 0:  # type: ignore[arg-type]
            count_E = self.decay * self.count_E + (1 - self.decay) * count_E  # type: ignore[operator]
            total = self.decay * self.tokens + (1 - self.decay) * total  # type: ignore[operator]
        self.count_E.copy_(count_E)  # type: ignore[union-attr,operator]
        self.tokens.copy_(total)  # type: ignore[union-attr,operator]
        self.at.fill_(step)  # type: ignore[union-attr,operator]
        return count_E, total

    def _by_sequence(self, experts_TK: Tensor, probs_TE: Tensor, sequence_T: Tensor) -> Tensor:
        number = probs_TE.shape[1]
        sequences, row_T = sequence_T.unique(return_inverse=True)
        rows = len(sequences)
        length = torch.bincount(row_T, minlength=rows).float()[:, None]
        flat = (row_T[:, None] * (number + 1) + experts_TK + 1).reshape(-1)
        count_BE = torch.bincount(flat, minlength=rows * (number + 1)).view(rows, -1)[:, 1:].float()
        p_BE = probs_TE.new_zeros(rows, number).index_add(0, row_T, probs_TE) / length
        f_BE = self._frequency(count_BE, length)
        return balance(f_BE, p_BE, self.weight_E, self.groups).sum() / rows  # type: ignore[arg-type]


@method("layers.losses.balance", kind="loss", fidelity="exact", paper="2101.03961")
def balance_loss(
    site: Site,
    *,
    weight: Scheduled = 0.01,
    scope: str = "micro",
    convention: str = "share",
    groups: int = 0,
    first_slot: bool = False,
    normalise: bool = False,
    decay: float = 0.9,
) -> Balance:
    """Any count-based loss without weights per expert.

    groups: balance between contiguous groups (devices) instead of experts; 0: off. first_slot: count each token's first choice only.
    normalise: divide probs by their sum first (sigmoid gates). decay: of the running mean.
    """
    return Balance(
        site,
        weight,
        scope=scope,
        convention=convention,
        groups=groups,
        first_slot=first_slot,
        normalise=normalise,
        decay=decay,
    )
