"""Grouped-query attention with rotary positions: the mixer of Llama, Mixtral, Qwen3 and OLMoE.

Paper      Ainslie et al. 2023, arXiv 2305.13245; rotary positions: Su et al. 2021, arXiv 2104.09864
Idea       Several query heads read one head of keys and values.
Rule       softmax(rope(q) rope(k)^T / sqrt(w) + causal) v, rope on halves (w, w + W/2); optional RMSNorm of q and k first
Needs      heads, kv_heads, d_head, qk_norm of the configuration
Gives      a mixer
Departs    nothing
Checked    logits equal to transformers' after export to a family
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import rotate


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        d, h, kv, w = config.d_model, config.heads, config.key_heads, config.head_width
        self.q_proj = nn.Linear(d, h * w, bias=False)
        self.k_proj = nn.Linear(d, kv * w, bias=False)
        self.v_proj = nn.Linear(d, kv * w, bias=False)
        self.o_proj = nn.Linear(h * w, d, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(h * w if full else w, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(kv * w if full else w, eps=config.norm_eps)
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(linear.weight, std=config.init_std)
        nn.init.normal_(self.o_proj.weight, std=config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        width, norm = self.config.head_width, self.config.qk_norm
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, width)) for part in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v.to(q.dtype)))
        grouped = self.config.heads != self.config.key_heads
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


@method("layers.mixers.attention", kind="mixer", fidelity="exact", paper="2305.13245")
def attention(config: MoEConfig) -> Attention:
    """Attention as the configuration's heads and norms say."""
    return Attention(config)
