"""Llama 4, text: top-k of the logits, a sigmoid of the chosen that multiplies the expert's input, one shared expert."""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("llama4_text",)


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth, step = config.integer("num_hidden_layers"), config.integer("interleave_moe_layer_step", default=1)
    spec = ExpertSpec(config.integer("hidden_size"), config.integer("intermediate_size"), config.activation(), weigh_input=True)
    listed = config.layer_list("moe_layers")
    per_layer = 2 * config.kv_heads(8) * config.head_dim(128)
    chunk = config.integer("attention_chunk_size", default=8192)
    chunked = _chunked(config, depth)
    return Block(
        experts=config.integer("num_local_experts", default=16),
        top_k=config.integer("num_experts_per_tok", default=1),
        spec=spec,
        router=RouterFacts("logits", "sigmoid_after"),
        layers=tuple(range(step - 1, depth, step)) if listed is None else listed,
        kv_values=per_layer * depth,
        window=chunk if chunked else 0,
        windowed_values=per_layer * chunked,
        shared=spec.d_expert,
        transposed=True,
        tied=config.flag("tie_word_embeddings", False),
        ignored=(r"^(model\.)?vision_model\.", r"^(model\.)?multi_modal_projector\."),
    )


def _chunked(config: Settings, depth: int) -> int:
    """How many layers attend within chunks only."""
    if kinds := config.value("layer_types", default=None):
        return sum(kind == "chunked_attention" for kind in kinds)
    interval = config.integer("no_rope_layer_interval", default=4)
    rope = config.value("no_rope_layers", default=None) or [int((i + 1) % interval != 0) for i in range(depth)]
    return sum(map(bool, rope))
