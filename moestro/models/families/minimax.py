"""MiniMax-M2: sigmoid router with a correction bias in the choice, weights that sum to 1, SwiGLU experts."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("minimax_m2",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth = config.integer("num_hidden_layers")
    return Block(
        experts=config.integer("num_local_experts", "num_experts", default=256),
        top_k=config.integer("num_experts_per_tok", default=8),
        spec=ExpertSpec(config.integer("hidden_size"), config.integer("intermediate_size"), config.activation()),
        router=RouterFacts("sigmoid", renormalised=True, selection_bias=True),
        layers=tuple(range(depth)),
        kv_values=2 * config.kv_heads(8) * config.head_dim(128) * depth,
        tied=config.flag("tie_word_embeddings", False),
    )
