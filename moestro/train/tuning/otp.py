"""MC#'s online top-any pruning: a small network for each layer learns how many of a token's experts it may leave out.

Paper      Huang et al. 2025, arXiv 2510.10962
Idea       Distil the model into itself with experts missing, at a price for every expert that runs.
Rule       y = softmax((log pi + gumbel) / tau), its argmax going forward and its gradient back; m_i = sum of y_j over candidates that keep
           slot i; weights g_i m_i; loss = KL(all experts || masked) + price * mean number of experts kept; only the networks are trained
Needs      nothing: the model without masks is the teacher
Gives      the tap layers.taps.learned_mask with its weights for each layer; the model itself stays as it is
Departs    candidates, network and schedule are not known: see the tap; tau falls geometrically from `warm` to `cold`
Checked    only the networks have gradients; a higher price keeps fewer experts; at as many experts nearer to the model than drawn ones beside each token's heaviest
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.plans.compression import TapUse
from moestro.core.routing import OnRouting, RouteContext, Routing, Tap
from moestro.layers.taps.first import rank
from moestro.layers.taps.learned_mask import NAMES, ordered, scores
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome, run
from moestro.train.pretrained import Pretrained
from moestro.train.tuned import Left, Tuning, distance


class Network(nn.Module):
    """pi of one layer, and the mask it makes. At first it keeps everything."""

    def __init__(self, d_model: int, slots: int, hidden: int, renormalise: bool, rng: torch.Generator) -> None:
        super().__init__()
        self.renormalise = renormalise
        self.w1 = nn.Parameter(torch.randn(d_model + slots, hidden, generator=rng) / (d_model + slots) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.zeros(hidden, slots))
        self.b2 = nn.Parameter(torch.zeros(slots))
        with torch.no_grad():
            self.b2[-1] = 1.0

    def mask(self, routing: Routing, x_TD: Tensor, tau: float, rng: torch.Generator | None) -> Tensor:
        """mask_TK, 0 or 1 going forward. rng: None for the argmax without noise."""
        rank_TK = rank(routing)
        pi_TK = scores(x_TD.float(), ordered(routing.weights_TK, rank_TK), {name: getattr(self, name) for name in NAMES})
        log_TK = functional.log_softmax(pi_TK, -1)
        if rng is not None:
            log_TK = log_TK - torch.empty_like(log_TK).exponential_(generator=rng).clamp_min(1e-20).log()
        soft_TK = functional.softmax(log_TK / tau, -1)
        hard_TK = functional.one_hot(log_TK.argmax(-1), soft_TK.shape[1]).to(soft_TK.dtype)
        chosen_TK = hard_TK + soft_TK - soft_TK.detach()
        keeps_TK = chosen_TK.flip(-1).cumsum(-1).flip(-1)  # by rank: the sum over candidates that keep as many or more
        return keeps_TK.gather(1, rank_TK)

    def masked(self, routing: Routing, mask_TK: Tensor) -> Routing:
        weights_TK = routing.weights_TK * mask_TK
        if self.renormalise:
            weights_TK = weights_TK * (
                routing.weights_TK.sum(-1, keepdim=True) / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
            )
        return Routing(routing.experts_TK, weights_TK, routing.logits_TE, routing.probs_TE)


class Otp(nn.Module):
    """The objective, with the networks as its parameters."""

    def __init__(self, student: Pretrained, price: float, hidden: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.price, self.tau, self.rng, self.masking = price, 1.0, None, True
        self.kept: list[Tensor] = []
        self.networks = nn.ModuleList()
        for layer in student.model.layers:
            facts = layer.facts
            renormalise = facts.router.renormalised or facts.router.weights.endswith("_after")
            network = Network(facts.spec.d_model, facts.top_k, hidden, renormalise, rng)
            self.networks.append(network)
            layer.replace(router=layer.router.tapped(Tap("routing", self._tap(network, student))))

    def _tap(self, network: Network, student: Pretrained) -> OnRouting:
        def tap(routing: Routing, ctx: RouteContext) -> Routing:
            if not self.masking:
                return routing
            assert isinstance(ctx.x_TD, Tensor)
            mask_TK = network.mask(routing, ctx.x_TD, self.tau, self.rng if student.training else None)
            self.kept.append(mask_TK.sum(-1).mean())
            return network.masked(routing, mask_TK)

        return tap

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        assert isinstance(module, Pretrained)
        with torch.no_grad():
            self.masking = False
            full_BTV = module.logits(batch.tokens_BT)
        self.masking, self.rng, self.kept = True, rng, []
        output = run(module, batch, step, rng)
        far, kept = distance(output.logits_BTV, full_BTV), torch.stack(self.kept).mean()
        return Outcome(far + self.price * kept, {"distance": far, "kept": kept}, (output,))


class Cooling:
    """The phase that lowers tau."""

    def __init__(self, otp: Otp, warm: float, cold: float) -> None:
        self.otp, self.warm, self.cold = otp, warm, cold

    def __call__(self, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, steps: int) -> Mapping[str, float]:
        self.otp.tau = self.warm * (self.cold / self.warm) ** (step / max(1, steps - 1))
        return {"tau": self.otp.tau}


@method("train.tuning.otp", kind="tuning", fidelity="adapted", paper="2510.10962")
def otp(
    student: Pretrained,
    teacher: Pretrained | None,
    *,
    price: float = 0.02,
    hidden: int = 64,
    warm: float = 2.0,
    cold: float = 0.1,
) -> Tuning:
    """price: nats per token that one expert of a layer less may cost. Raises InputError."""
    if price < 0 or hidden < 1 or not 0 < cold <= warm:
        raise InputError(
            f"price {price:g}, hidden {hidden}, tau {warm:g} to {cold:g}", expected="at least 0, 1, and falling above 0"
        )
    objective = Otp(student, price, hidden)

    def left() -> Left:
        taps, arrays = [], {}
        for i, network in enumerate(objective.networks):
            assert isinstance(network, Network)
            settings = {"arrays": f"layer-{i}.", "renormalise": network.renormalise}
            taps.append((TapUse("layers.taps.learned_mask", settings),))
            arrays |= {f"layer-{i}.{name}": getattr(network, name).detach().numpy() for name in NAMES}
        return Left(tuple(taps), arrays)

    return Tuning(objective, (Cooling(objective, warm, cold),), left, rate=1e-2)
