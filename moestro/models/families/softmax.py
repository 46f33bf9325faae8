"""Softmax over all experts, top-k of the probabilities, SwiGLU experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo, HunYuan, Jamba.

They differ in whether the chosen probabilities are made to sum to 1, in the shared expert, and in which layers are dense.
"""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "hunyuan_v1_moe", "jamba")


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    depth, width = config.integer("num_hidden_layers"), config.integer("hidden_size")
    described = {"mixtral": _mixtral, "hunyuan_v1_moe": _hunyuan, "jamba": _jamba, "olmoe": _olmo, "flex_olmo": _olmo}
    return described.get(config.model_type, _qwen)(config, depth, width)


def _spec(config: Settings, width: int, *names: str) -> ExpertSpec:
    return ExpertSpec(width, config.integer(*names), config.activation())


def _mixtral(config: Settings, depth: int, width: int) -> Block:
    kv = 2 * config.kv_heads(8) * config.head_dim() * depth
    window = config.integer("sliding_window", default=0)
    return Block(
        experts=config.integer("num_local_experts", "num_experts", default=8),
        top_k=config.integer("num_experts_per_tok", default=2),
        spec=_spec(config, width, "intermediate_size"),
        router=RouterFacts("softmax", renormalised=True),
        layers=tuple(range(depth)),
        kv_values=kv,
        window=window,
        windowed_values=kv if window else 0,
        tied=config.flag("tie_word_embeddings", False),
    )


def _qwen(config: Settings, depth: int, width: int) -> Block:
    step, dense = config.integer("decoder_sparse_step", default=1), config.layer_list("mlp_only_layers") or ()
    older = config.model_type == "qwen2_moe"
    layers = tuple(i for i in range(depth) if i not in dense and (i + 1) % step == 0)
    per_layer = 2 * config.kv_heads(16 if older else 4) * config.head_dim()
    window = config.integer("sliding_window", default=4096) if config.flag("use_sliding_window", False) else 0
    windowed = _qwen_windowed(config, depth, older) if window else 0
    return Block(
        experts=config.integer("num_experts", "num_local_experts", default=60 if older else 128),
        top_k=config.integer("num_experts_per_tok", default=4 if older else 8),
        spec=_spec(config, width, "moe_intermediate_size"),
        router=RouterFacts("softmax", renormalised=config.flag("norm_topk_prob", False)),
        layers=layers,
        kv_values=per_layer * depth,
        window=window if windowed else 0,
        windowed_values=per_layer * windowed,
        shared=config.integer("shared_expert_intermediate_size", default=5632) if older else 0,
        tied=config.flag("tie_word_embeddings", False),
    )


def _qwen_windowed(config: Settings, depth: int, older: bool) -> int:
    if not older:
        return depth
    if kinds := config.value("layer_types", default=None):
        return sum(kind == "sliding_attention" for kind in kinds)
    below = config.integer("max_window_layers", default=28)
    return sum((i + 1) % 2 == 1 and i < below for i in range(depth))


def _olmo(config: Settings, depth: int, width: int) -> Block:
    older = config.model_type == "olmoe"
    return Block(
        experts=config.integer("num_experts", "num_local_experts", default=64 if older else 7),
        top_k=config.integer("num_experts_per_tok", default=8 if older else 5),
        spec=_spec(config, width, "intermediate_size"),
        router=RouterFacts("softmax", renormalised=config.flag("norm_topk_prob", False)),
        layers=tuple(range(depth)),
        kv_values=2 * config.kv_heads() * config.head_dim() * depth,
        tied=config.flag("tie_word_embeddings", False),
    )


def _hunyuan(config: Settings, depth: int, width: int) -> Block:
    spec = _spec(config, width, "intermediate_size")
    return Block(
        experts=config.integer("num_experts", "num_local_experts", default=1),
        top_k=config.integer("moe_topk", "num_experts_per_tok", default=1),
        spec=spec,
        router=RouterFacts("softmax", renormalised=True),
        layers=tuple(range(depth)),
        kv_values=2 * config.kv_heads() * config.head_dim() * depth,
        shared=spec.d_expert,
        tied=config.flag("tie_word_embeddings", False),
    )


def _jamba(config: Settings, depth: int, width: int) -> Block:
    period, offset = config.integer("expert_layer_period", default=2), config.integer("expert_layer_offset", default=1)
    every, first = config.integer("attn_layer_period", default=8), config.integer("attn_layer_offset", default=4)
    attention = sum(i % every == first for i in range(depth))
    inner = config.integer("mamba_expand", default=2) * width
    state = inner * (config.integer("mamba_d_conv", default=4) + config.integer("mamba_d_state", default=16))
    head = width // config.integer("num_attention_heads", default=32)
    return Block(
        experts=config.integer("num_experts", "num_local_experts", default=16),
        top_k=config.integer("num_experts_per_tok", default=2),
        spec=_spec(config, width, "intermediate_size"),
        router=RouterFacts("softmax"),
        layers=tuple(i for i in range(depth) if i % period == offset),
        kv_values=2 * config.kv_heads(8) * head * attention,
        state_values=state * (depth - attention),
        tied=config.flag("tie_word_embeddings", False),
    )
