"""DiT-MoE: a diffusion transformer whose feed-forward layers are experts.

Paper      Fei et al. 2024, arXiv 2407.11633; DiT: Peebles and Xie 2022, arXiv 2212.09748
Idea       Denoising can be learned by sparse layers too; which expert a token meets depends on its place and on the noise, hardly on its class.
Rule       c = MLP(sin/cos of time) + class embedding; (shift, scale, gate) x 2 = W_c silu(c), W_c starts at 0 (adaLN-Zero)
           x += gate_a mixer(LN(x) (1 + scale_a) + shift_a); x += gate_m block(LN(x) (1 + scale_m) + shift_m); velocity = W_o mod(LN(x)), W_o at 0
Needs      the configuration's block and mixer; the paper: top-2 of 8 or 16, raw weights, d_shared of two experts, balance 0.01 (recipe `dit`)
           given: state_BTC (default: the tokens without noise), time_B (0), label_B (-1: no class)
Gives      a model whose output is the velocity of each token's state; objective `rectified_flow` trains it
Departs    A patch is one token; its state is one number in [-1, 1] where `levels` names ids that are ordered, else one channel per id. Positions are
           rotary in one dimension. Classes are token ids. Trait causal: attention reads the whole sample, by design
Checked    a fresh model is the identity before its last map, and gives 0; a class and a time change the output after training; recipe trained
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput, Controller, Output
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import DecoderLayer, controllers, decoder_layers, rotary_table
from moestro.layers.site import require


class Modulated(nn.Module):
    """A mixer and a block, both under adaLN-Zero."""

    def __init__(self, config: MoEConfig, inner: DecoderLayer) -> None:
        super().__init__()
        self.mixer, self.block = inner.mixer, inner.block
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps, elementwise_affine=False)
        self.modulation = nn.Linear(config.d_model, 6 * config.d_model)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, x_BTD: Tensor, c_BD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, ctx: RouteContext
    ) -> tuple[Tensor, BlockOutput]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(functional.silu(c_BD))[:, None].chunk(6, -1)
        x_BTD = x_BTD + gate_a * self.mixer(self.norm(x_BTD) * (1 + scale_a) + shift_a, rotary, mask)
        out: BlockOutput = self.block((self.norm(x_BTD) * (1 + scale_m) + shift_m).flatten(0, 1), ctx)
        return x_BTD + gate_m * out.y_TD.view(x_BTD.shape), out


class DiT(nn.Module):
    """levels: the ids that are levels of one number, or None for a channel per id."""

    def __init__(self, config: MoEConfig, levels: tuple[int, int] | None) -> None:
        super().__init__()
        self.config, self.levels = config, levels
        d, channels = config.d_model, 1 if levels else config.vocabulary
        self.embedding = nn.Linear(channels, d)
        self.classes = nn.Embedding(config.vocabulary + 1, d)  # the last: no class
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        nn.init.normal_(self.classes.weight, std=config.init_std)
        self.layers = nn.ModuleList(Modulated(config, layer) for layer in decoder_layers(config))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(d, eps=config.norm_eps, elementwise_affine=False)
        self.modulation, self.head = nn.Linear(d, 2 * d), nn.Linear(d, channels)
        for part in (self.modulation, self.head):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def state_of(self, tokens_BT: Tensor) -> Tensor:
        """state_BTC of tokens without noise."""
        if self.levels is None:
            return functional.one_hot(tokens_BT, self.config.vocabulary).float()
        first, end = self.levels
        return (2 * (tokens_BT - first).float() / (end - first - 1) - 1)[..., None]

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        step: int = 0,
        rng: torch.Generator | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Output:
        """velocity_BTC in the place of logits, losses and routings. Of the tokens the shape is read, and the state where none is given."""
        b, t = tokens_BT.shape
        carry = dict(given or {})
        state = carry.pop("state_BTC", None)
        x = self.embedding(self.state_of(tokens_BT) if state is None else state)
        time_B = carry.pop("time_B", torch.zeros(b))
        label_B = carry.pop("label_B", torch.full((b,), -1))
        c_BD = self.time(waves(time_B, self.config.d_model)) + self.classes(label_B % (self.config.vocabulary + 1))
        position = torch.arange(t).expand(b, t)
        rotary = rotary_table(position, self.config.head_width, self.config.rope_theta)
        mask = torch.ones(1, 1, t, t, dtype=torch.bool)
        row = torch.arange(b)[:, None].expand(b, t).reshape(-1)
        # The state is noise, so a router is not told the tokens.
        ctx = RouteContext(0, self.training, step, None, row, position.reshape(-1), rng, carry)
        losses: dict[str, Tensor] = {}
        routings: list[Routing] = []
        for layer in self.layers:
            x, out = layer(x, c_BD, rotary, mask, replace(ctx, layer=len(routings)))
            routings += out.routings
            for name, loss in out.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        shift, scale = self.modulation(functional.silu(c_BD))[:, None].chunk(2, -1)
        return Output(self.head(self.norm(x) * (1 + scale) + shift), losses, tuple(routings))

    def controllers(self) -> Iterator[Controller]:
        """Every module with `after_step`, once each."""
        return controllers(self)


def waves(time_B: Tensor, width: int) -> Tensor:
    """[B, width]: cosines and sines of 1000 t at frequencies from 1 down to 1/10000."""
    half = -(-width // 2)
    angle = 1000 * time_B[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat((angle.cos(), angle.sin()), -1)[:, :width]


@method("layers.architectures.dit", kind="architecture", fidelity="adapted", paper="2407.11633", traits=("causal",))
def dit(config: MoEConfig, *, levels: list[int] | None = None) -> DiT:
    """levels: [first, after the last] id of ordered levels, [14, 31] for the pixels of `samples:digits`."""
    require(
        levels is None or (len(levels) == 2 and 0 <= levels[0] < levels[1] - 1), f"levels {levels}", "[first, after the last]"
    )
    return DiT(config, None if levels is None else (levels[0], levels[1]))
