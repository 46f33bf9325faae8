"""LFM2-MoE: sigmoid router with an expert bias in the choice, SwiGLU experts, short convolutions beside attention."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("lfm2_moe",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth, width = config.integer("num_hidden_layers"), config.integer("hidden_size")
    attention = sum(kind != "conv" for kind in config.value("layer_types"))
    head = width // config.integer("num_attention_heads", default=32)
    return Block(
        experts=config.integer("num_experts", default=32),
        top_k=config.integer("num_experts_per_tok", default=4),
        spec=ExpertSpec(width, config.integer("moe_intermediate_size")),
        router=RouterFacts(
            "sigmoid",
            renormalised=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", 1.0),
            selection_bias=config.flag("use_expert_bias", True),
        ),
        layers=tuple(range(config.integer("num_dense_layers", default=2), depth)),
        kv_values=2 * config.kv_heads(8) * head * attention,
        state_values=width * config.integer("conv_L_cache", default=3) * (depth - attention),
        tied=config.flag("tie_embedding" if "tie_embedding" in config.data else "tie_word_embeddings", True),
    )
