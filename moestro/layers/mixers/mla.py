"""Multi-head latent attention: keys and values of all heads from one small vector per token, and one rotary key for all heads.

Paper      DeepSeek-AI 2024, arXiv 2405.04434
Idea       Only the small vector and the rotary key need to be kept per token.
Rule       c = norm(W_a x)[:r], k_rope = rope(W_a x)[r:]; (k_nope, v)_h = W_b c; q_h = (nope, rope(.)); k_h = (k_nope, k_rope);
           softmax(q k^T / sqrt(nope + rope) + causal) v; with q_rank the query too goes through a normed small vector
Needs      heads and d_head of the configuration (the rotary width); kv_heads and qk_norm are not used
Gives      a mixer
Departs    rotary on halves (w, w + W/2); the published weights pair neighbours, which is a permutation of rows
Checked    logits equal to transformers' DeepSeek-V2 and V3 after export
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import rotate
from moestro.layers.site import require


class LatentAttention(nn.Module):
    """Widths: rope (d_head of the configuration), nope and value per head; ranks of the small vectors (q_rank 0: none)."""

    def __init__(self, config: MoEConfig, kv_rank: int, q_rank: int, d_nope: int, d_value: int) -> None:
        super().__init__()
        require(kv_rank >= 1 and q_rank >= 0, f"ranks {kv_rank} and {q_rank}", "kv_rank at least 1, q_rank at least 0")
        require(config.qk_norm == "none", f"qk_norm {config.qk_norm!r} with latent attention", "none")
        require(config.key_heads == config.heads, f"{config.key_heads} key heads with latent attention", "kv_heads 0")
        self.heads, self.rope = config.heads, config.head_width
        self.nope, self.value, self.kv_rank = d_nope or self.rope, d_value or self.rope, kv_rank
        width, h = config.d_model, self.heads
        if q_rank:
            self.q_a_proj = nn.Linear(width, q_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(q_rank, eps=config.norm_eps)
        self.q_proj = nn.Linear(q_rank or width, h * (self.nope + self.rope), bias=False)
        self.kv_a_proj = nn.Linear(width, kv_rank + self.rope, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, eps=config.norm_eps)
        self.kv_b_proj = nn.Linear(kv_rank, h * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(h * self.value, width, bias=False)
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=config.init_std)
        nn.init.normal_(self.o_proj.weight, std=config.init_std / (2 * config.layers) ** 0.5)
        self.q_rank = q_rank

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q = self.q_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)) if self.q_rank else x_BTD).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split((self.nope, self.rope), -1)
        latent, k_rope = self.kv_a_proj(x_BTD).split((self.kv_rank, self.rope), -1)
        k_nope, v = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).split((self.nope, self.value), -1)
        q_rope, k_rope = rotate(q_rope, *rotary), rotate(k_rope[:, :, None], *rotary)
        q = torch.cat((q_nope, q_rope), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), -1).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2).to(q.dtype), mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


@method("layers.mixers.mla", kind="mixer", fidelity="exact", paper="2405.04434")
def mla(config: MoEConfig, *, kv_rank: int = 32, q_rank: int = 0, d_nope: int = 0, d_value: int = 0) -> LatentAttention:
    """kv_rank, q_rank: of the small vectors (q_rank 0: none). d_nope, d_value: per head, 0: as wide as the rotary part (d_head)."""
    return LatentAttention(config, kv_rank, q_rank, d_nope, d_value)
