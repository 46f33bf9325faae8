"""Top-k: the plain router of Mixtral, OLMoE, Qwen-MoE, GPT-OSS and Granite, by its conventions.

Paper      Shazeer et al. 2017, arXiv 1701.06538, without its noise
Idea       A linear gate; the k best experts of each token.
Rule       z = x W^T; p = softmax z or sigmoid z; S = the k largest; g by `combine`: raw p (OLMoE, Qwen2-MoE), renormalised
           (Mixtral, Qwen3-MoE), softmax of the chosen logits (GPT-OSS, Granite), sigmoid of the chosen logits (Llama 4)
Needs      nothing
Gives      a router with a balance loss
Departs    nothing
Checked    routing and logits equal to transformers' families
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import NORMALISE, Combine, Linear, TopK


@method("layers.routers.topk", kind="router", fidelity="exact", paper="1701.06538")
def topk(
    site: Site,
    *,
    score: str = "softmax",
    combine: str = "renormalised",
    scale: float = 1.0,
    bias: bool = False,
    balance: Scheduled = 0.01,
) -> StagedRouter:
    """score: 'softmax', 'sigmoid', 'relu' or 'identity'. combine: see `layers.stages.Combine`. bias: of the gate."""
    require(score in NORMALISE, f"score {score!r}", "one of " + ", ".join(NORMALISE))
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=Linear(site, bias=bias),
        normalise=NORMALISE[score],
        select=TopK(site.top_k),
        combine=Combine(combine, scale),
        losses={"balance": Balance(site, balance, normalise=score != "softmax")} if balance else {},
    )
