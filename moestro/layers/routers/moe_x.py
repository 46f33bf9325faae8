"""MoE-X: the router asks which expert would fire the fewest neurons, and answers from the experts' own weights.

Paper      Yang et al. 2025, arXiv 2503.07639
Idea       ReLU experts are slices of one wide sparse network. Sending a token where few neurons fire makes each of them mean something.
Rule       mu_ej, s2_ej: mean and population variance over expert e's neurons of their weight for input j; m = mu x, v = s2 x^2;
           rho_e = Phi(m / sqrt v), the expected share of active neurons; p = softmax(-rho / temperature); S = the K largest; g by `combine`
           loss = alpha E sum_e f_e P_e
Needs      stacked experts; meant for activation relu, gated false. With gated experts the gate's rows are read
Gives      a router without parameters, with balance loss
Departs    the form of the softmax's argument is from memory, the temperature is ours. The gradient reaches the experts' first weights
           through mu and s2, unless `detach`. Trait gradient: the router has no parameters of its own
Checked    rho against the measured share of random experts; rho of c x is that of x; experts and weights equal one wide network
"""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.routing import RouteContext
from moestro.layers.experts import ExpertBank, Joined, Stacked
from moestro.layers.losses.balance import Balance
from moestro.layers.router import StagedRouter
from moestro.layers.schedule import Scheduled
from moestro.layers.site import Site, require
from moestro.layers.stages import Combine, TopK, softmax


class PredictedSparsity:
    """logits_TE: minus the expected share of active neurons, over a temperature."""

    def __init__(self, bank: ExpertBank, temperature: float, detach: bool) -> None:
        self.stacks, self.temperature, self.detach = stacks(bank), temperature, detach

    def __call__(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        mean_ED, variance_ED, mean_E, variance_E = (
            torch.cat(part) for part in zip(*map(self._statistics, self.stacks), strict=True)
        )
        m_TE = x_TD @ mean_ED.t() + mean_E
        v_TE = x_TD.square() @ variance_ED.t() + variance_E
        return -active_share(m_TE, v_TE) / self.temperature

    def _statistics(self, stack: Stacked) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and variances over the neurons: of the weights [E, D], and of the biases [E]."""
        f = stack.spec.d_expert
        first_EFD = stack.gate_up_EFD[:, :f].float()
        bias_EF = stack.gate_up_EF[:, :f].float() if stack.spec.bias else first_EFD.new_zeros(stack.num, f)
        if self.detach:
            first_EFD, bias_EF = first_EFD.detach(), bias_EF.detach()
        return (
            first_EFD.mean(1),
            first_EFD.var(1, unbiased=False),
            bias_EF.mean(1),
            bias_EF.var(1, unbiased=False),
        )


def active_share(mean: Tensor, variance: Tensor) -> Tensor:
    """Phi(mean / sqrt variance): the share of Gaussian pre-activations above 0."""
    return 0.5 * (1 + torch.erf(mean * (2 * variance.clamp_min(1e-12)).rsqrt()))


def stacks(bank: ExpertBank) -> tuple[Stacked, ...]:
    """The stacked parts of a bank, in order of ids. Raises InputError when others are there."""
    found = list(bank.banks) if isinstance(bank, Joined) else [bank]
    for part in found:
        if not isinstance(part, Stacked):
            raise InputError(f"the router moe_x with experts of type {type(part).__name__}", expected="stacked experts")
    return tuple(found)  # type: ignore[arg-type]


@method("layers.routers.moe_x", kind="router", fidelity="adapted", paper="2503.07639", traits=("gradient",))
def moe_x(
    site: Site, *, combine: str = "renormalised", temperature: float = 1.0, detach: bool = False, balance: Scheduled = 0.01
) -> StagedRouter:
    """combine: see `layers.stages.Combine`. temperature: shares lie between 0 and 1, so that below 1 the weights differ more."""
    require(temperature > 0, f"temperature {temperature}", "above 0")
    require(site.top_k <= site.num_experts, f"top_k {site.top_k} of {site.num_experts} experts", "no more slots than experts")
    return StagedRouter(
        score=PredictedSparsity(site.bank(), temperature, detach),
        normalise=softmax,
        select=TopK(site.top_k),
        combine=Combine(combine),
        losses={"balance": Balance(site, balance)},
    )
