"""GPT-OSS: biases everywhere, sinks, a sliding window in every other layer, YaRN."""

from __future__ import annotations

from moestro.models.families.settings import Settings
from moestro.models.native.decoder import Decoder, Router
from moestro.models.native.names import Names
from moestro.models.native.rope import parameters, rope

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}


def gpt_oss(config: Settings, names: Names) -> Decoder:
    """The window is in the even layers unless the file lists the layers' types."""
    width, bias, layers = config.head_dim(64), config.flag("attention_bias", True), []
    depth, window = names.facts.decoder_layers, config.integer("sliding_window", default=128)
    kinds = config.value("layer_types", default=None) or ["sliding_attention", "full_attention"] * depth
    for index in range(depth):
        at = names.layer(index)
        attention = names.attention(
            at,
            kv_heads=config.kv_heads(8),
            width=width,
            bias=bias,
            out_bias=bias,
            window=window if kinds[index] == "sliding_attention" else 0,
            sinks=True,
        )
        router = Router(names.linear(names.experts(index), names.d_model, f"{at}mlp.router", bias=True))
        layers.append(names.made(at, attention, router=router, mlp=None))
    turned = rope(parameters(config, 150_000.0, YARN | {"original_max_position_embeddings": 4096}), width)
    return names.decoder(layers, turned, config.number("rms_norm_eps", 1e-5))


FAMILIES = {"gpt_oss": gpt_oss}
