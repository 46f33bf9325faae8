"""HMoE: experts of different sizes, each use charged by its size.

Paper      Wang et al. 2024, arXiv 2408.10681
Idea       Without a price the large experts take everything. Charged by size, small ones are the default and large ones are chosen where
           they are worth it.
Rule       P = softmax(x W^T); S = top-p or top-k; g = P of the chosen, raw
           loss = alpha E sum_e M_e P_e + beta mean_t H(P_t); M_e = (c_e / T) h_e / mean h; h: sizes; the second term with top-p only
Needs      experts of different sizes, such as the bank `widths`; sizes are read as costs, so cost-free experts are free of charge
Gives      a router with the size penalty
Departs    the entropy is minimised, as is meant; the printed sign would raise it. Raw weights with top-k are our reading
Checked    equal sizes: the balance loss; the gradient of equally used experts is in proportion to their sizes
"""

from __future__ import annotations

import torch
from torch import nn

from moestro.core.method import method
from moestro.layers.losses.balance import Balance
from moestro.layers.losses.entropy import Entropy
from moestro.layers.router import StagedRouter
from moestro.layers.routers.top_p import TopP
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK, softmax


@method("layers.routers.hmoe", kind="router", fidelity="faithful", paper="2408.10681")
def hmoe(
    site: Site, *, select: str = "top_p", p: float = 0.6, penalty: Scheduled = 0.1, entropy: Scheduled = 0.03
) -> StagedRouter:
    """select: 'top_p' with p, or 'top_k' with top_k of the configuration. penalty, entropy: alpha and beta."""
    require(select in ("top_p", "top_k"), f"select {select!r}", "top_p or top_k")
    require(0 <= p <= 1, f"p {p}", "0 to 1")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    costs_E = torch.tensor(site.bank().costs, dtype=torch.float32)
    losses: dict[str, nn.Module] = {
        "size_penalty": Balance(site, penalty, convention="tokens", weight_E=costs_E / costs_E.mean())
    }
    if select == "top_p":
        losses["entropy"] = Entropy(entropy)
    return StagedRouter(
        score=Linear(site),
        normalise=softmax,
        select=TopP(p) if select == "top_p" else TopK(site.top_k),
        combine=Combine("raw"),
        losses=losses,
    )
