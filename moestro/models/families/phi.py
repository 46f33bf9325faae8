"""Phi-MoE: sparsemixer routing (two masked softmaxes, one after the other), SwiGLU experts."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("phimoe",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth = config.integer("num_hidden_layers")
    kv = 2 * config.kv_heads(8) * config.head_dim() * depth
    window = config.integer("sliding_window", default=0)
    return Block(
        experts=config.integer("num_local_experts", default=16),
        top_k=config.integer("num_experts_per_tok", default=2),
        spec=ExpertSpec(config.integer("hidden_size"), config.integer("intermediate_size"), config.activation()),
        router=RouterFacts("sparsemixer", "masked_softmax"),
        layers=tuple(range(depth)),
        kv_values=kv,
        window=window,
        windowed_values=kv if window else 0,
        tied=config.flag("tie_word_embeddings", False),
    )
