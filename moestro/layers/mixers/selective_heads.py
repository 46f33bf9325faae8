"""Selective attention: heads are experts; each token has its queries and keys in a few of them.

Paper      Yang et al. 2025, Union-of-Experts, arXiv 2503.02495
Idea       Multi-head attention cut by heads is a sum of equal experts, so tokens can be routed to heads as to feed-forward slices.
Rule       s = softmax(x W_g) over heads; a token is of its k best; head h computes q, k, v for its tokens only, attention is causal among
           them; y = sum_h W_o_h softmax(q_h k_h^T / sqrt(w)) v_h, scattered back to the tokens of h
Needs      heads, d_head of the configuration; as many key heads as heads, no norm of queries
Gives      a mixer; the routing of heads is not among the model's routings
Departs    Positions turn by their own number, not by rank in the list. The released code gives the gate no gradient; here each token's part of a
           head is times 1 + s - stopgrad(s). A token always sees itself in a head that it has
Checked    k = all heads is plain attention; equal to attention with masks written out; the rows computed are k per token
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.method import method
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import rotate
from moestro.layers.site import require
from moestro.layers.stages import mask_of


class SelectiveHeads(nn.Module):
    """q, k, v [H, 3 w, D] and o [H, D, w]: one slice of the weights for each head."""

    def __init__(self, config: MoEConfig, k: int) -> None:
        super().__init__()
        heads, w, d = config.heads, config.head_width, config.d_model
        require(config.key_heads == heads, f"{config.key_heads} key heads for {heads} heads", "as many: a head is an expert")
        require(config.qk_norm == "none", f"qk_norm {config.qk_norm}", "none")
        require(1 <= k <= heads, f"{k} of {heads} heads", f"1 to {heads}")
        self.k, self.heads = k, heads
        self.gate = nn.Linear(d, heads)
        nn.init.normal_(self.gate.weight, std=config.init_std)
        nn.init.zeros_(self.gate.bias)
        self.qkv_HWD = nn.Parameter(torch.randn(heads, 3 * w, d) * config.init_std)
        self.out_HDW = nn.Parameter(torch.randn(heads, d, w) * config.init_std / (2 * config.layers) ** 0.5)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        b, t, d = x_BTD.shape
        s_BTH = self.gate(x_BTD.float()).softmax(-1)
        of_BHT = mask_of(s_BTH.flatten(0, 1).topk(self.k, -1).indices, self.heads).view(b, t, -1).transpose(1, 2)
        # Each head's tokens in order of position, then others up to the longest list.
        longest = int(of_BHT.sum(-1).max()) if of_BHT.numel() else 0
        place_BHN = of_BHT.long().argsort(stable=True, dim=-1, descending=True)[..., :longest]
        kept_BHN = of_BHT.gather(-1, place_BHN)
        rows = torch.arange(b, device=x_BTD.device)[:, None, None]
        q, k, v = torch.einsum("bhnd,hwd->bhnw", x_BTD[rows, place_BHN], self.qkv_HWD.to(x_BTD.dtype)).chunk(3, -1)
        cos, sin = (part.expand(b, -1, -1, -1)[:, :, 0][rows, place_BHN] for part in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if mask is None:
            seen = place_BHN[..., :, None] >= place_BHN[..., None, :]
        else:
            full = mask.expand(b, 1, t, t)[:, 0]
            seen = full[rows[..., None], place_BHN[..., :, None], place_BHN[..., None, :]]
        own = torch.eye(longest, dtype=torch.bool, device=x_BTD.device)  # padding sees itself, lest it be NaN
        y = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), (seen & kept_BHN[..., None, :]) | own)
        g_BHN = s_BTH.transpose(1, 2).gather(-1, place_BHN)
        weight = (1 + (g_BHN - g_BHN.detach())).masked_fill(~kept_BHN, 0.0).to(y.dtype)
        y_BHND = torch.einsum("bhnw,hdw->bhnd", y, self.out_HDW.to(y.dtype)) * weight[..., None]
        flat = (rows * t + place_BHN).reshape(-1)
        return y_BHND.new_zeros(b * t, d).index_add(0, flat, y_BHND.reshape(-1, d)).view(b, t, d)


@method("layers.mixers.selective_heads", kind="mixer", fidelity="adapted", paper="2503.02495")
def selective_heads(config: MoEConfig, *, k: int = 0) -> SelectiveHeads:
    """k: heads of a token, 0 for half of them."""
    return SelectiveHeads(config, k or max(1, config.heads // 2))
