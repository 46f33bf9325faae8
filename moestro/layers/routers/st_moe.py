"""ST-MoE: GShard's top-2 gate with wider buffers and the router z-loss.

Paper      Zoph et al. 2022, arXiv 2202.08906
Idea       Training diverges when the router's logits grow; a small penalty on their normaliser keeps them small and costs no quality.
Rule       as `gshard`, with capacity factor 1.25; loss = balance + z_weight mean_t (logsumexp_e z_te)^2
Needs      nothing; top_k of the configuration is not read: it is 2
Gives      a router with balance loss, z-loss and capacity
Departs    evaluation drops nothing (paper: factor 2.0). Traits as `gshard`
Checked    equal to gshard with the z-loss added
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.losses.z import ZLoss
from moestro.layers.router import StagedRouter
from moestro.layers.routers.gshard import gshard
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site


@method(
    "layers.routers.st_moe",
    kind="router",
    fidelity="faithful",
    paper="2202.08906",
    traits=("batch-in-training", "causal-in-training"),
)
def st_moe(
    site: Site,
    *,
    capacity: float = 1.25,
    evaluate_capacity: float = 0.0,
    random_second: bool = True,
    balance: Scheduled = 0.01,
    z: Scheduled = 0.001,
) -> StagedRouter:
    """capacity, evaluate_capacity: factors, 0 drops nothing. balance, z: weights of the losses."""
    router = gshard(site, capacity=capacity, evaluate_capacity=evaluate_capacity, random_second=random_second, balance=balance)
    router.losses["z"] = ZLoss(z)
    return router
