"""DeepSeekMoE: raw softmax weights of many small experts, balanced between experts and between devices.

Paper      Dai et al. 2024, arXiv 2401.06066
Idea       Fine experts combine in far more ways at equal cost, and an always-on expert keeps what all of them would learn alike. The
           block `segmented` cuts experts so; this is the gate and its losses.
Rule       s = softmax(x W^T) over the routed experts; S = the K largest; g = s, not renormalised
           loss = a1 sum_e f_e P_e + a2 sum_d f'_d P'_d; f_e = E c_e / (K T); f'_d the mean of f and P'_d the sum of P over device d
Needs      nothing
Gives      a router with balance losses
Departs    nothing; devices are contiguous groups of equal size, and there is no such loss without them
Checked    both losses by hand, 1 for even loads; equal to plain top-k
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, Linear, TopK, softmax


@method("layers.routers.deepseek_moe", kind="router", fidelity="faithful", paper="2401.06066")
def deepseek_moe(
    site: Site, *, balance: Scheduled = 0.01, devices: int = 0, device_balance: Scheduled = 0.05, scale: float = 1.0
) -> StagedRouter:
    """balance: a1, 0.001 in the 16B model. devices: groups for the device loss, 0 for none; device_balance: a2. scale: of the weights."""
    e, k = site.num_experts, site.top_k
    require(k <= e, f"top_k {k} of {e} experts", "no more slots than experts")
    require(devices >= 0 and (not devices or e % devices == 0), f"{devices} devices for {e} experts", "a divisor of the experts")
    losses = {"balance": Balance(site, balance)}
    if devices:
        losses["device_balance"] = Balance(site, device_balance, groups=devices)
    return StagedRouter(score=Linear(site), normalise=softmax, select=TopK(k), combine=Combine("raw", scale), losses=losses)
