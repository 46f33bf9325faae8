"""A small modern decoder: RMSNorm, rotary positions, grouped-query attention, a feed-forward or MoE block in every layer.

`build` makes a model from a `MoEConfig`; architectures use `Decoder` with other layers. Shapes: B sequences, T their tokens
(flattened to one row of T tokens inside blocks), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput, Controller, Dense, MoEBlock, Output
from moestro.layers.config import MoEConfig
from moestro.layers.experts import ExpertBank, Joined, Shared, down_std, spec_at
from moestro.layers.router import StagedRouter
from moestro.layers.site import Site


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + block(norm(x)). Architectures may put in any mixer or block with these signatures."""

    def __init__(self, config: MoEConfig, mixer: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = mixer
        self.block_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.block = block

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, ctx: RouteContext
    ) -> tuple[Tensor, BlockOutput]:
        x_BTD = x_BTD + self.mixer(self.mixer_norm(x_BTD), rotary, mask)
        out = self.block(self.block_norm(x_BTD).flatten(0, 1), ctx)
        return x_BTD + out.y_TD.view(x_BTD.shape), out


class Decoder(nn.Module):
    """Embedding, layers, norm, head. layers: modules with `DecoderLayer`'s signature; None: what the configuration asks for."""

    def __init__(self, config: MoEConfig, layers: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.layers = nn.ModuleList(decoder_layers(config) if layers is None else layers)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        else:
            nn.init.normal_(self.head.weight, std=config.init_std)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        step: int = 0,
        position_BT: Tensor | None = None,
        segment_BT: Tensor | None = None,
        rng: torch.Generator | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Output:
        """Logits, losses and routings.

        Args:
            step: the optimiser step, for schedules.
            position_BT: positions within each document; default 0..T-1.
            segment_BT: document numbers of a packed row: attention stays inside a document, and routers see them as sequences.
            rng: source of the routers' randomness; default torch's.
            given: facts about the tokens that a router may ask for (task, modality); starts the layer-to-layer state.

        Raises InputError for tokens outside the vocabulary, rows beyond the context, or a router that gives NaN.
        """
        b, t = tokens_BT.shape
        self._check(tokens_BT)
        position = torch.arange(t, device=tokens_BT.device).expand(b, t) if position_BT is None else position_BT
        row = torch.arange(b, device=tokens_BT.device)[:, None].expand(b, t)
        sequence, mask = row, self.visible(tokens_BT, segment_BT)
        if segment_BT is not None:
            sequence = row * (int(segment_BT.max()) + 1 if segment_BT.numel() else 1) + segment_BT
        x = self.embedding(tokens_BT)
        ids, rows, places = (part.reshape(-1) for part in (tokens_BT, sequence, position))
        ctx = RouteContext(0, self.training, step, ids, rows, places, rng, dict(given or {}))
        rotary = rotary_table(position, self.config.head_width, self.config.rope_theta)
        losses: dict[str, Tensor] = {}
        routings: list[Routing] = []
        for layer in self.layers:
            x, out = layer(x, rotary, mask, replace(ctx, layer=len(routings)))
            routings += out.routings
            for name, loss in out.losses.items():
                losses[name] = losses[name] + loss if name in losses else loss
        return Output(self.head(self.norm(x)), losses, tuple(routings))

    def visible(self, tokens_BT: Tensor, segment_BT: Tensor | None) -> Tensor | None:
        """bool [B, 1, T, T]: which positions each one reads; None: all up to itself. What is not causal overrides it."""
        if segment_BT is None:
            return None
        t = tokens_BT.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=tokens_BT.device).tril()
        return (causal & (segment_BT[:, :, None] == segment_BT[:, None, :]))[:, None]

    def controllers(self) -> Iterator[Controller]:
        """Every module with `after_step`, once each: to be called after each optimiser step."""
        return controllers(self)

    def _check(self, tokens_BT: Tensor) -> None:
        c = self.config
        if tokens_BT.shape[1] > c.context:
            raise InputError(f"{tokens_BT.shape[1]} tokens in a row", expected=f"at most the context, {c.context}")
        if tokens_BT.numel() and not (int(tokens_BT.min()) >= 0 and int(tokens_BT.max()) < c.vocabulary):
            raise InputError(
                f"token ids from {int(tokens_BT.min())} to {int(tokens_BT.max())}",
                expected=f"ids below the vocabulary, {c.vocabulary}",
            )


def build(config: MoEConfig) -> nn.Module:
    """The model of a configuration, with the initial weights of its seed; torch's random state is left as it was.

    Raises InputError for names, options or sizes that cannot be.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return config.architecture.make("architecture", config)


def decoder_layers(
    config: MoEConfig,
    *,
    block: Callable[[Site], nn.Module] | None = None,
    mixer: Callable[[MoEConfig], nn.Module] | None = None,
    pool: dict[str, nn.Module] | None = None,
) -> list[nn.Module]:
    """The layers that a configuration asks for; an architecture may put in another block or mixer."""
    pool = {} if pool is None else pool
    made: list[nn.Module] = []
    for i in range(config.layers):
        if i in config.dense_layers:
            spec = spec_at(site_of(config, 0, pool), config.dense_width)
            inner: nn.Module = Dense(Shared(spec, std=config.init_std, down_std=down_std(site_of(config, 0, pool))))
        else:
            site = site_of(config, config.moe_layers.index(i), pool)
            inner = block(site) if block else config.block.make("block", site)
        made.append(DecoderLayer(config, mixer(config) if mixer else config.mixer.make("mixer", config), inner))
    return made


def site_of(config: MoEConfig, layer: int, pool: dict[str, nn.Module]) -> Site:
    """The site of the routing with ordinal `layer`, without experts yet."""
    return Site(
        d_model=config.d_model,
        num_experts=config.num_experts,
        top_k=config.top_k,
        d_expert=config.d_expert,
        layer=layer,
        layers=len(config.moe_layers),
        vocabulary=config.vocabulary,
        init_std=config.init_std,
        config=config,
        pool=pool,
    )


def experts_at(site: Site) -> tuple[ExpertBank, Site]:
    """The bank that the configuration asks for (special experts last), and the site with it."""
    assert site.config is not None
    bank: ExpertBank = site.config.experts.make("experts", site)
    if site.config.special:
        bank = Joined([bank, *(part.make("experts", site) for part in site.config.special)])
    return bank, replace(site, num_experts=bank.num, experts=bank)


def router_at(site: Site) -> StagedRouter:
    """The router that the configuration asks for, with the configuration's taps."""
    assert site.config is not None
    router: StagedRouter = site.config.router.make("router", site)
    taps = [part.make("tap", site) for part in site.config.taps]
    return router.tapped(*taps) if taps else router


def losses_at(site: Site) -> dict[str, nn.Module]:
    """The configuration's further losses, by name."""
    assert site.config is not None
    return {part.name.rsplit(".", 1)[-1]: part.make("loss", site) for part in site.config.losses}


def shared_at(site: Site) -> Shared | None:
    """The always-on expert, or None."""
    c = site.config
    assert c is not None
    if not c.d_shared:
        return None
    return Shared(spec_at(site, c.d_shared), gate=c.shared_gate, std=site.init_std, down_std=down_std(site))


def block_at(site: Site) -> MoEBlock:
    """Experts, router, shared expert and losses as the configuration asks."""
    bank, site = experts_at(site)
    return MoEBlock(router_at(site), bank, shared_at(site), losses_at(site))


def controllers(module: nn.Module) -> Iterator[Controller]:
    """Every controller inside a module, once each."""
    return (m for m in module.modules() if isinstance(m, Controller))


def rotary_table(position_BT: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, width] of rotary positions, halves concatenated as in Hugging Face models."""
    rate = theta ** -(torch.arange(0, width, 2, device=position_BT.device).float() / width)
    angle = position_BT[..., None].float() * rate
    angle = torch.cat((angle, angle), -1)[:, :, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHW: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (w, w + W/2) of a head by its angle."""
    a, b = x_BTHW.chunk(2, -1)
    return x_BTHW * cos.to(x_BTHW.dtype) + torch.cat((-b, a), -1) * sin.to(x_BTHW.dtype)
