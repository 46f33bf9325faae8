"""GPT-OSS: top-k of the router's logits, softmax over the chosen, clamped SwiGLU with biases, gate and up interleaved."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("gpt_oss",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth = config.integer("num_hidden_layers")
    per_layer = 2 * config.kv_heads(8) * config.head_dim(64)
    kinds = config.value("layer_types", default=None)
    windowed = sum(k == "sliding_attention" for k in kinds) if kinds else (depth + 1) // 2
    return Block(
        experts=config.integer("num_local_experts", "num_experts", default=128),
        top_k=config.integer("num_experts_per_tok", default=4),
        spec=ExpertSpec(
            config.integer("hidden_size"),
            config.integer("intermediate_size"),
            "swiglu_clamped",
            bias=True,
            limit=config.number("swiglu_limit", 7.0),
            alpha=config.number("swiglu_alpha", 1.702),
        ),
        router=RouterFacts("logits", "softmax_after", renormalised=True),
        layers=tuple(range(depth)),
        kv_values=per_layer * depth,
        window=config.integer("sliding_window", default=128),
        windowed_values=per_layer * windowed,
        transposed=True,
        interleaved=True,
        tied=config.flag("tie_word_embeddings", False),
    )
