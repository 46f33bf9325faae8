"""Granite-MoE and its variant with a shared MLP: top-k of the logits, softmax over the chosen, SwiGLU, fused on disk."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("granitemoe", "granitemoeshared")


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth, shared = config.integer("num_hidden_layers"), config.model_type == "granitemoeshared"
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return Block(
        experts=config.integer("num_local_experts", default=8),
        top_k=config.integer("num_experts_per_tok", default=2),
        spec=ExpertSpec(width, config.integer("intermediate_size"), config.activation()),
        router=RouterFacts("logits", "softmax_after", renormalised=True),
        layers=tuple(range(depth)),
        kv_values=2 * config.kv_heads() * (width // heads) * depth,
        shared=config.integer("shared_intermediate_size", default=0) if shared else 0,
        tied=config.flag("tie_word_embeddings", False),
    )
