"""BlockFFN: a gate whose zeros choose, with losses that make neighbouring tokens choose alike.

Paper      Song et al. 2025, arXiv 2507.08771
Idea       ReLU decides how many experts a token has, differentiably; a norm after it frees the amount from the choice. Sparse for a
           token, and for a chunk of tokens, is what speeds up small devices.
Rule       a = ReLU(x W^T); n = a rsqrt(mean_e a^2 + eps); S = where a > 0; g = n w, w a learned scale per expert that starts at 1
           loss = chunk sparsity + activation locality; nothing balances
Needs      many small experts without a gate branch: activation silu, gated false, and the objective `adaptive` for the paper's weight of the
           chunk loss
Gives      a router with both losses; tokens without any expert are legal
Departs    experts run sparsely where the paper trains one wide feed-forward: the results are equal. For the losses see theirs. Trait
           relabel: w has an entry for each expert, which renaming the logits alone does not rename
Checked    scores of c x are those of x; support of the scores is that of ReLU; sparse equals dense; no expert is no output
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.losses.chunk_sparsity import ChunkSparsity
from moestro.layers.losses.locality import Locality
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site
from moestro.layers.stages import Draft, Linear, where


class NormedReLU:
    """ReLU, then divided by the root mean square over the experts."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, logits_TE: Tensor, ctx: RouteContext) -> Tensor:
        a_TE = logits_TE.relu()
        return a_TE * (a_TE.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def support(scores_TE: Tensor, ctx: RouteContext) -> Tensor:
    """Every expert with a positive score."""
    return where(scores_TE > 0, scores_TE)


class Scaled(nn.Module):
    """The scores times a learned weight of each expert."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.scale_E = nn.Parameter(torch.ones(site.num_experts))

    def forward(self, draft: Draft, ctx: RouteContext) -> Tensor:
        return draft.chosen(draft.probs_TE * self.scale_E)


@method("layers.routers.blockffn", kind="router", fidelity="faithful", paper="2507.08771", traits=("relabel",))
def blockffn(
    site: Site,
    *,
    chunk_sparsity: Scheduled = 0.05,
    chunk: int = 64,
    locality: Scheduled = 0.002,
    sharpness: float = 100.0,
    eps: float = 1e-6,
) -> StagedRouter:
    """chunk_sparsity, locality: weights of the losses. chunk: L in tokens. sharpness: A. eps: of the norm."""
    return StagedRouter(
        score=Linear(site),
        normalise=NormedReLU(eps),
        select=support,
        combine=Scaled(site),
        losses={
            "chunk_sparsity": ChunkSparsity(site, chunk_sparsity, chunk),
            "locality": Locality(site, locality, sharpness),
        },
    )
