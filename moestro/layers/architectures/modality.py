"""Modality experts: every weight of a layer once for text and once for images, chosen by the token's type; attention is common.

Paper      Wang et al. 2025, MINT, arXiv 2503.01298; the design is that of Liang et al. 2024, Mixture-of-Transformers, arXiv 2411.04996
Idea       Modalities conflict in weights, not in attention: with copies for each, a language model learns images without forgetting.
Rule       m_i from the token's id; with the copy of m_i: q_i, k_i, v_i = W_m norm_m(x_i); attention over all; x_i += O_m a_i; x_i += FFN_m(norm_m(x_i))
           image blocks may see themselves whole (`both_ways`), text is causal
Needs      widths of the configuration; its experts, router, num_experts and top_k are not read; images are ids `image`
Gives      a model whose copies start equal, which is then the dense model; one routing per layer, the modality
Departs    Inferred from the abstract and the nearest design: embedding, last norm and head are common. Images are predicted token by token; with
           both_ways their tokens would be seen before they are predicted, so it is for objectives that predict the text only. The data of
           multi-modal reasoning is not built
Checked    equal copies are the dense model for any types; text does not read image weights; training images only leaves text's logits bit for bit
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.core.routing import RouteContext, Routing
from moestro.layers.block import BlockOutput
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import Decoder, rotate, site_of
from moestro.layers.experts import Shared, down_std, spec_at
from moestro.layers.mixers.attention import Attention
from moestro.layers.modality import IMAGE, TEXT, image_ids, modality_of, modality_T
from moestro.layers.site import require


class Copies(nn.Module):
    """One module for text and an equal one for images."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.of = nn.ModuleList([text, copy.deepcopy(text)])

    def apply_to(self, x_TD: Tensor, kind_T: Tensor, fn: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """fn of the copy that each token is for."""
        if bool((kind_T == kind_T[:1]).all()) and len(kind_T):
            return fn(self.of[int(kind_T[0])], x_TD)
        parts = [fn(self.of[kind], x_TD[kind_T == kind]) for kind in (TEXT, IMAGE)]
        order = torch.cat([(kind_T == kind).nonzero()[:, 0] for kind in (TEXT, IMAGE)])
        return torch.cat(parts).index_select(0, order.argsort())


class ModalityLayer(nn.Module):
    """A decoder layer in two copies around one attention."""

    def __init__(self, config: MoEConfig, image: tuple[int, int]) -> None:
        super().__init__()
        require(config.qk_norm == "none", f"qk_norm {config.qk_norm}", "none")
        site = site_of(config, 0, {})
        self.config, self.image = config, image
        self.mixer_norm, self.block_norm = (Copies(nn.RMSNorm(config.d_model, eps=config.norm_eps)) for _ in range(2))
        self.mixer = Copies(Attention(config))
        self.feed_forward = Copies(Shared(spec_at(site, config.dense_width), std=site.init_std, down_std=down_std(site)))

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, ctx: RouteContext
    ) -> tuple[Tensor, BlockOutput]:
        b, t, _ = x_BTD.shape
        x, kind_T = x_BTD.flatten(0, 1), modality_T(ctx, b * t, self.image).to(x_BTD.device)
        normed = self.mixer_norm.apply_to(x, kind_T, lambda norm, rows: norm(rows))
        joined = self.mixer.apply_to(
            normed,
            kind_T,
            lambda a, rows: torch.cat((a.q_proj(rows), a.k_proj(rows), a.v_proj(rows)), -1),  # type: ignore[operator]
        )
        width, heads, kv = self.config.head_width, self.config.heads, self.config.key_heads
        q, k, v = (part.view(b, t, -1, width) for part in joined.split([heads * width, kv * width, kv * width], -1))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.to(q.dtype)))
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=heads != kv)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)
        x = x + self.mixer.apply_to(y, kind_T, lambda a, rows: a.o_proj(rows))  # type: ignore[operator]
        normed = self.block_norm.apply_to(x, kind_T, lambda norm, rows: norm(rows))
        x = x + self.feed_forward.apply_to(normed, kind_T, lambda ffn, rows: ffn(rows))
        one = functional.one_hot(kind_T, 2).float()
        routing = Routing(kind_T[:, None], one.new_ones(b * t, 1), one, one)
        return x.view(x_BTD.shape), BlockOutput(x, (routing,))


class ModalityDecoder(Decoder):
    """both_ways: the tokens of one uninterrupted run of image tokens see each other."""

    def __init__(self, config: MoEConfig, image: tuple[int, int], both_ways: bool) -> None:
        super().__init__(config, [ModalityLayer(config, image) for _ in range(config.layers)])
        self.image, self.both_ways = image, both_ways

    def visible(self, tokens_BT: Tensor, segment_BT: Tensor | None) -> Tensor | None:
        mask = super().visible(tokens_BT, segment_BT)
        if not self.both_ways:
            return mask
        kind = modality_of(tokens_BT, self.image)
        begins = torch.ones_like(kind)
        begins[:, 1:] = (kind[:, 1:] != kind[:, :-1]).long()
        if segment_BT is not None:
            begins[:, 1:] |= (segment_BT[:, 1:] != segment_BT[:, :-1]).long()
        run = begins.cumsum(1)
        block = (run[:, :, None] == run[:, None, :]) & (kind == IMAGE)[:, :, None]
        t = tokens_BT.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=tokens_BT.device).tril()[None, None] if mask is None else mask
        return causal | block[:, None]


@method("layers.architectures.modality", kind="architecture", fidelity="adapted", paper="2503.01298")
def modality(
    config: MoEConfig, *, image: list[int] | None = None, both_ways: bool = False, train: str = "all"
) -> ModalityDecoder:
    """image: [first, after the last] id, None for `samples:digits`. train: 'all', or 'image' to freeze all but the images' copies."""
    require(train in ("all", "image"), f"train {train!r}", "all or image")
    model = ModalityDecoder(config, image_ids(image), both_ways)
    if train == "image":
        model.requires_grad_(False)
        for part in model.modules():
            if isinstance(part, Copies):
                part.of[IMAGE].requires_grad_(True)
    return model
