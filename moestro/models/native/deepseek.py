"""DeepSeek-V2 and V3 with latent attention, and GLM-4-MoE with grouped-query attention: dense first layers, then shared experts."""

from __future__ import annotations

from moestro.models.families.settings import Settings
from moestro.models.native.decoder import Attention, Decoder, Latent, Layer, Router
from moestro.models.native.names import Names
from moestro.models.native.rope import parameters, rope, score_scale

LATENT_EPS = 1e-6  # of the two norms inside latent attention, whatever the configuration says


def deepseek_v2(config: Settings, names: Names) -> Decoder:
    """Softmax router; pairs of dimensions turn side by side."""
    return _deepseek(config, names, interleaved=True, mlp_bias=config.flag("mlp_bias", False))


def deepseek_v3(config: Settings, names: Names) -> Decoder:
    """Sigmoid router with a bias on the choice."""
    return _deepseek(config, names, interleaved=config.flag("rope_interleave", True), corrected=True)


def _deepseek(config: Settings, names: Names, *, interleaved: bool, mlp_bias: bool = False, corrected: bool = False) -> Decoder:
    turned = parameters(config)
    layers = [
        _layer(config, names, index, _latent(config, names, names.layer(index), score_scale(turned)), mlp_bias, corrected)
        for index in range(names.facts.decoder_layers)
    ]
    width = config.integer("qk_rope_head_dim", default=64)
    return names.decoder(layers, rope(turned, width, interleaved=interleaved), config.number("rms_norm_eps", 1e-6))


def glm4_moe(config: Settings, names: Names) -> Decoder:
    """Half of each head's dimensions turn; queries and keys may be normalised head by head."""
    width, bias, layers = config.head_dim(), config.flag("attention_bias", False), []
    norm = "heads" if config.flag("use_qk_norm", False) else ""
    for index in range(names.facts.decoder_layers):
        at = names.layer(index)
        attention = names.attention(at, kv_heads=config.kv_heads(8), width=width, bias=bias, qk_norm=norm)
        layers.append(_layer(config, names, index, attention, False, True))
    return names.decoder(layers, rope(parameters(config), width, partial=0.5), config.number("rms_norm_eps", 1e-5))


def _layer(config: Settings, names: Names, index: int, attention: Attention | Latent, mlp_bias: bool, corrected: bool) -> Layer:
    at, experts = names.layer(index), names.experts(index)
    if not experts:
        dense = names.mlp(f"{at}mlp", config.integer("intermediate_size"), bias=mlp_bias)
        return names.made(at, attention, router=None, mlp=dense)
    shared = names.facts.layers[0].shared
    gate = names.linear(experts, names.d_model, f"{at}mlp.gate")
    return names.made(
        at,
        attention,
        router=Router(gate, names.tensor((experts,), f"{at}mlp.gate.e_score_correction_bias") if corrected else ""),
        mlp=names.mlp(f"{at}mlp.shared_experts", shared, bias=mlp_bias) if shared else None,
    )


def _latent(config: Settings, names: Names, at: str, growth: float) -> Latent:
    heads, rank = config.integer("num_attention_heads"), config.integer("kv_lora_rank", default=512)
    nope, rotated = config.integer("qk_nope_head_dim", default=128), config.integer("qk_rope_head_dim", default=64)
    value, stem = config.integer("v_head_dim", default=128), f"{at}self_attn."
    bias, width = config.flag("attention_bias", False), nope + rotated
    low = config.data.get("q_lora_rank", 1536)
    if low is None:
        q, q_a, q_norm = names.linear(heads * width, names.d_model, f"{stem}q_proj"), None, ""
    else:
        q = names.linear(heads * width, low, f"{stem}q_b_proj")
        q_a, q_norm = names.linear(low, names.d_model, f"{stem}q_a_proj", bias=bias), names.norm(f"{stem}q_a_layernorm", low)
    return Latent(
        q,
        q_a,
        q_norm,
        kv_a=names.linear(rank + rotated, names.d_model, f"{stem}kv_a_proj_with_mqa", bias=bias),
        kv_norm=names.norm(f"{stem}kv_a_layernorm", rank),
        kv_b=names.linear(heads * (nope + value), rank, f"{stem}kv_b_proj"),
        o=names.linear(names.d_model, heads * value, f"{stem}o_proj", bias=bias),
        heads=heads,
        nope=nope,
        rope=rotated,
        value=value,
        rank=rank,
        scale=width**-0.5 * growth,
        eps=LATENT_EPS,
    )


FAMILIES = {"deepseek_v2": deepseek_v2, "deepseek_v3": deepseek_v3, "glm4_moe": glm4_moe}
