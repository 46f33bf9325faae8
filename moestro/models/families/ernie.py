"""ERNIE 4.5 MoE: softmax with a correction bias in the choice, weights that sum to 1, shared experts as one wide MLP."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("ernie4_5_moe",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth = config.integer("num_hidden_layers")
    spec = ExpertSpec(config.integer("hidden_size"), config.integer("moe_intermediate_size"), config.activation())
    first, last = config.integer("moe_layer_start_index", default=1), config.integer("moe_layer_end_index", default=-1)
    last, every = depth - 1 if last == -1 else last, config.integer("moe_layer_interval", default=1)
    return Block(
        experts=config.integer("moe_num_experts", "num_experts", default=64),
        top_k=config.integer("moe_k", "num_experts_per_tok", default=6),
        spec=spec,
        router=RouterFacts("softmax", renormalised=True, selection_bias=True),
        layers=tuple(i for i in range(depth) if (i + 1) % every == 0 and first <= i <= last),
        kv_values=2 * config.kv_heads(4) * config.head_dim() * depth,
        shared=config.integer("moe_num_shared_experts", default=2) * spec.d_expert,
        tied=config.flag("tie_word_embeddings", True),
        ignored=("mtp",),
    )
