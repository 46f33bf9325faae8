"""MoIIE: a token may go to the experts of its own modality or to those of both, never to the other modality's.

Paper      Wang et al. 2025, arXiv 2508.09779
Idea       What two modalities have in common is learned in shared experts, what they have not in their own.
Rule       experts 0 .. E/4-1 vision, .. 3E/4-1 shared, then E/4 language; images route by Gv over the first 3E/4, text by Gl over the last
           p = softmax over what is visible; top-k, renormalised
           loss = balance * (L_v + L_l); L_m = (3E/4) sum_e f_e P_e over the modality's tokens and visible experts, f_e = c_e / tokens (k when even)
Needs      num_experts divisible by 4; images are ids `image`
Gives      a router with the balance of both modalities
Departs    The paper makes experts of a dense layer's copies and trains in two stages; here it is the router alone. Every second layer is dense there:
           dense_layers. Trait relabel: experts have fixed roles
Checked    visibility; losses by hand, with one modality missing; gradient of the other modality's experts is zero; equal experts give the dense layer
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.balance import balance as product
from moestro.layers.modality import IMAGE, TEXT, image_ids, modality_T
from moestro.layers.reduce import counts
from moestro.layers.router import Decision, StagedRouter
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax


class TwoGates(nn.Module):
    """logits_TE by the gate of the token's modality, -inf where it does not see. Leaves modality_T in ctx.notes."""

    def __init__(self, site: Site, image: tuple[int, int]) -> None:
        super().__init__()
        self.seen, self.image = 3 * site.num_experts // 4, image
        self.gates = nn.ModuleList([site.linear(self.seen), site.linear(self.seen)])
        self.first = (site.num_experts - self.seen, 0)  # of text, of images

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        kind_T = ctx.notes["modality_T"] = modality_T(ctx, len(x_TD), self.image).to(x_TD.device)
        logits_TE = x_TD.new_full((len(x_TD), self.seen + self.first[TEXT]), float("-inf"))
        for kind in (TEXT, IMAGE):
            mine = (kind_T == kind).nonzero()[:, 0]
            columns = torch.arange(self.first[kind], self.first[kind] + self.seen, device=x_TD.device)
            logits_TE = logits_TE.index_put((mine[:, None], columns[None]), self.gates[kind](x_TD[mine]))
        return logits_TE


class Visible(TopK):
    """The k most probable experts, of those that are visible."""

    def __call__(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        experts_TK = super().__call__(scores_TE, ctx)
        return experts_TK.masked_fill(scores_TE.gather(1, experts_TK) <= 0, -1)


class PerModality(nn.Module):
    """The balance of each modality that has tokens."""

    def __init__(self, weight: Scheduled, seen: int) -> None:
        super().__init__()
        self.weight, self.seen = read(weight), seen

    def forward(self, decision: Decision) -> Tensor:
        kind_T, total = decision.ctx.notes["modality_T"], decision.probs_TE.sum() * 0.0
        for kind in (TEXT, IMAGE):
            mine = (kind_T == kind).nonzero()[:, 0]
            if len(mine):
                f_E = counts(decision.chosen.experts_TK[mine], decision.num_experts) / len(mine)
                total = total + self.seen / decision.num_experts * product(f_E, decision.probs_TE[mine].mean(0))
        return value_at(self.weight, decision.ctx.step) * total


@method("layers.routers.moiie", kind="router", fidelity="faithful", paper="2508.09779", traits=("relabel",))
def moiie(site: Site, *, image: list[int] | None = None, balance: Scheduled = 0.001) -> StagedRouter:
    """image: [first, after the last] id of image tokens, None for those of `samples:digits`."""
    seen = 3 * site.num_experts // 4
    require(site.num_experts % 4 == 0, f"{site.num_experts} experts", "a multiple of 4")
    require(site.top_k <= seen, f"top_k {site.top_k} of {seen} visible experts", "no more slots than experts")
    return StagedRouter(
        score=TwoGates(site, image_ids(image)),
        normalise=softmax,
        select=Visible(site.top_k),
        combine=Combine("renormalised"),
        losses={"balance": PerModality(balance, seen)},
    )
