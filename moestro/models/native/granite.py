"""Granite-MoE and its variant with an MLP that every token passes: Llama's layers with four multipliers."""

from __future__ import annotations

from moestro.models.families.settings import Settings
from moestro.models.native.decoder import Decoder, Mlp, Router
from moestro.models.native.names import Names
from moestro.models.native.rope import parameters, rope


def granite(config: Settings, names: Names) -> Decoder:
    """The attention's scale is given, not derived from the heads' width."""
    width, bias, layers = config.head_dim(), config.flag("attention_bias", False), []
    shared = names.facts.layers[0].shared
    for index in range(names.facts.decoder_layers):
        at = names.layer(index)
        attention = names.attention(
            at,
            kv_heads=config.kv_heads(),
            width=width,
            scale=config.number("attention_multiplier", 1.0),
            bias=bias,
            out_bias=bias,
        )
        block = f"{at}block_sparse_moe.router"
        router = Router(names.linear(names.experts(index), names.d_model, f"{block}.layer", block))
        mlp = None
        if shared:
            both = names.linear(2 * shared, names.d_model, f"{at}shared_mlp.input_linear")
            mlp = Mlp(both, None, names.linear(names.d_model, shared, f"{at}shared_mlp.output_linear"))
        layers.append(names.made(at, attention, router=router, mlp=mlp))
    return names.decoder(
        layers,
        rope(parameters(config), width),
        config.number("rms_norm_eps", 1e-6),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logits_divisor=config.number("logits_scaling", 1.0),
    )


FAMILIES = {"granitemoe": granite, "granitemoeshared": granite}
