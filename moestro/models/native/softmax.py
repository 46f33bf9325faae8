"""Decoders with a softmax router: Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from moestro.core.errors import UnsupportedModel
from moestro.models.families.settings import Settings
from moestro.models.native.decoder import Decoder, Router
from moestro.models.native.names import Names
from moestro.models.native.rope import parameters, rope


def mixtral(config: Settings, names: Names) -> Decoder:
    """Llama's layers with routed experts, and perhaps a sliding window."""
    width, layers = config.head_dim(), []
    for index in range(names.facts.decoder_layers):
        at = names.layer(index)
        attention = names.attention(
            at, kv_heads=config.kv_heads(8), width=width, window=config.integer("sliding_window", default=0)
        )
        gate = names.linear(names.experts(index), names.d_model, f"{at}block_sparse_moe.gate", f"{at}mlp.gate")
        layers.append(names.made(at, attention, router=Router(gate), mlp=None))
    turned = rope(parameters(config, 1_000_000.0), width)
    return names.decoder(layers, turned, config.number("rms_norm_eps", 1e-5))


def olmoe(config: Settings, names: Names) -> Decoder:
    """Queries and keys are normalised over all heads at once, and may be clipped."""
    width, bias, layers = config.head_dim(), config.flag("attention_bias", False), []
    for index in range(names.facts.decoder_layers):
        at = names.layer(index)
        attention = names.attention(
            at,
            kv_heads=config.kv_heads(),
            width=width,
            bias=bias,
            out_bias=bias,
            qk_norm="whole",
            clip=config.number("clip_qkv", 0.0),
        )
        gate = names.linear(names.experts(index), names.d_model, f"{at}mlp.gate")
        layers.append(names.made(at, attention, router=Router(gate), mlp=None))
    return names.decoder(layers, rope(parameters(config), width), config.number("rms_norm_eps", 1e-5))


def qwen2_moe(config: Settings, names: Names) -> Decoder:
    """Biases on queries, keys and values; an expert for every token, weighed by a gate; dense layers in between."""
    width, bias, layers = config.head_dim(), config.flag("qkv_bias", True), []
    for index, window in enumerate(_windows(config, names.facts.decoder_layers)):
        at = names.layer(index)
        attention = names.attention(at, kv_heads=config.kv_heads(16), width=width, bias=bias, window=window)
        experts = names.experts(index)
        if not experts:
            dense = names.mlp(f"{at}mlp", config.integer("intermediate_size"))
            layers.append(names.made(at, attention, router=None, mlp=dense))
            continue
        layers.append(
            names.made(
                at,
                attention,
                router=Router(names.linear(experts, names.d_model, f"{at}mlp.gate")),
                mlp=names.mlp(f"{at}mlp.shared_expert", config.integer("shared_expert_intermediate_size", default=5632)),
                mlp_gate=names.linear(1, names.d_model, f"{at}mlp.shared_expert_gate"),
            )
        )
    return names.decoder(layers, rope(parameters(config), width), config.number("rms_norm_eps", 1e-6))


def qwen3_moe(config: Settings, names: Names) -> Decoder:
    """Queries and keys are normalised head by head; dense layers in between."""
    width, bias, layers = config.head_dim(), config.flag("attention_bias", False), []
    window = config.integer("sliding_window", default=4096) if config.flag("use_sliding_window", False) else 0
    for index in range(names.facts.decoder_layers):
        at = names.layer(index)
        attention = names.attention(
            at, kv_heads=config.kv_heads(4), width=width, bias=bias, out_bias=bias, qk_norm="heads", window=window
        )
        experts = names.experts(index)
        router = Router(names.linear(experts, names.d_model, f"{at}mlp.gate")) if experts else None
        dense = None if experts else names.mlp(f"{at}mlp", config.integer("intermediate_size"))
        layers.append(names.made(at, attention, router=router, mlp=dense))
    return names.decoder(layers, rope(parameters(config), width), config.number("rms_norm_eps", 1e-6))


def _windows(config: Settings, depth: int) -> list[int]:
    """Per layer the sliding window or 0, by Qwen2's rule where the file does not list the layers' types."""
    sliding = config.flag("use_sliding_window", False)
    below = config.integer("max_window_layers", default=28)
    chosen = [sliding and (i + 1) % 2 == 1 and i < below for i in range(depth)]
    if kinds := config.value("layer_types", default=None):
        chosen = [kind == "sliding_attention" for kind in kinds]
        if any(chosen) and not sliding:
            raise UnsupportedModel("layers with a sliding window, and use_sliding_window is off", expected="one or the other")
    window = config.integer("sliding_window", default=4096)
    return [window if slides else 0 for slides in chosen]


FAMILIES = {"mixtral": mixtral, "olmoe": olmoe, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe}
