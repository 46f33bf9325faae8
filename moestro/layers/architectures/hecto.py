"""Hecto: two experts of different kinds, of which a gate runs one: a feed-forward layer on a summary, or a recurrence over the sequence.

Paper      2025, arXiv 2506.22919
Idea       Some samples need order, some do not; experts of different architecture divide the work visibly.
Rule       p = softmax(W h / tau) of the summary h; e = argmax p; y = E_e * p_e / stopgrad(p_e): E_0 = W2 tanh(W1 h), E_1 = W3 GRU(h_1 .. h)
           loss += sure * mean H(p) + even * sum_e (mean p_e - 1/2)^2
Needs      layers, d_dense of the configuration for the encoder, which is dense; its router, experts, num_experts and top_k are not read
Gives      a decoder whose last layer is the pair of experts
Departs    The paper's summary is [CLS] of DistilBERT; here it is the position itself and what is before it, so that every position is a sample
           and nothing is seen ahead; read 'last' is one decision per sample. Experts give features of the model's width, and the classifier behind them
           is common. The straight-through gradient and the forms of both losses are inferred
Checked    only the chosen expert runs and gets a gradient; an order task and a bag task are told apart
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder, decoder_layers
from moestro.layers.schedule import Scheduled, read, value_at
from moestro.layers.site import require

STATIC, TEMPORAL = 0, 1


class Pair(nn.Module):
    """The gate and both experts, with a decoder layer's signature: x_BTD becomes the chosen expert's output."""

    def __init__(self, config: MoEConfig, hidden: int, tau: float, sure: Scheduled, even: Scheduled, last: bool) -> None:
        super().__init__()
        d = config.d_model
        self.norm, self.gate = nn.RMSNorm(d, eps=config.norm_eps), nn.Linear(d, 2, bias=False)
        self.static = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, d))
        self.temporal, self.out = nn.GRU(d, hidden, batch_first=True), nn.Linear(hidden, d)
        self.tau, self.sure, self.even, self.last = tau, read(sure), read(even), last

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, ctx: RouteContext
    ) -> tuple[Tensor, BlockOutput]:
        x_BTD = self.norm(x_BTD)
        asked = x_BTD[:, -1:] if self.last else x_BTD
        logits = self.gate(asked).float() / self.tau
        probs = logits.softmax(-1)
        choice = probs.argmax(-1)
        y = torch.zeros_like(asked)
        if bool((choice == STATIC).any()):
            y = y.masked_scatter((choice == STATIC)[..., None], self.static(asked[choice == STATIC]).to(y.dtype))
        rows = (choice == TEMPORAL).any(1)
        if bool(rows.any()):
            state = self.temporal(x_BTD[rows])[0]
            state = state[:, -1:] if self.last else state
            mine = choice[rows] == TEMPORAL
            y = y.masked_scatter((choice == TEMPORAL)[..., None], self.out(state[mine]).to(y.dtype))
        picked = probs.gather(-1, choice[..., None])
        y = y * (picked / picked.detach().clamp_min(1e-20)).to(y.dtype)
        losses = {}
        if ctx.training and probs.numel():
            entropy = -torch.special.xlogy(probs, probs.clamp_min(1e-30)).sum(-1).mean()
            apart = (probs.flatten(0, 1).mean(0) - 0.5).square().sum()
            losses = {"sure": value_at(self.sure, ctx.step) * entropy, "even": value_at(self.even, ctx.step) * apart}
        routing = Routing(choice.reshape(-1, 1), picked.reshape(-1, 1), logits.flatten(0, 1), probs.flatten(0, 1))
        return y, BlockOutput(y, (routing,), losses)


@method("layers.architectures.hecto", kind="architecture", fidelity="adapted", paper="2506.22919")
def hecto(
    config: MoEConfig, *, hidden: int = 128, tau: float = 1.5, sure: Scheduled = 0.01, even: Scheduled = 0.1, read: str = "all"
) -> Decoder:
    """hidden: of both experts. sure, even: weights of the losses, the paper's are not known. read: 'all' positions decide, or the 'last' alone."""
    require(hidden >= 1 and tau > 0, f"hidden {hidden}, tau {tau}", "above 0")
    require(read in ("all", "last"), f"read {read!r}", "all or last")
    body = decoder_layers(replace(config, dense_layers=tuple(range(config.layers))))
    return Decoder(config, [*body, Pair(config, hidden, tau, sure, even, read == "last")])
