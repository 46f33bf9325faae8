"""DeepSeek-V2 (softmax, optional groups) and the sigmoid router with a correction bias: DeepSeek-V3, GLM-4-MoE, dots1.

All have SwiGLU experts, dense first layers and shared experts that form one wide MLP.
"""

from __future__ import annotations

from moestro.core.experts import ExpertSpec
from moestro.core.layer import RouterFacts
from moestro.models.families.block import Block
from moestro.models.families.settings import Settings

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1")


def block(config: Settings) -> Block:
    """The family's blocks from its configuration."""
    kind, depth = config.model_type, config.integer("num_hidden_layers")
    spec = ExpertSpec(config.integer("hidden_size"), config.integer("moe_intermediate_size"), config.activation())
    shared = {"deepseek_v2": 2, "deepseek_v3": 1, "glm4_moe": 1, "dots1": 0}[kind]
    top_k = {"deepseek_v2": {}, "deepseek_v3": {"default": 8}, "glm4_moe": {"default": 8}, "dots1": {}}[kind]
    experts = {"deepseek_v2": {"default": 64}, "deepseek_v3": {"default": 256}, "glm4_moe": {"default": 128}, "dots1": {}}[kind]
    dense = {"deepseek_v2": 0, "deepseek_v3": 3, "glm4_moe": 1, "dots1": 0}[kind]
    kv, window, windowed = _kv(config, depth)
    return Block(
        experts=config.integer("n_routed_experts", "num_experts", "num_local_experts", **experts),
        top_k=config.integer("num_experts_per_tok", **top_k),
        spec=spec,
        router=_softmax(config) if kind == "deepseek_v2" else _sigmoid(config),
        layers=tuple(range(config.integer("first_k_dense_replace", default=dense), depth)),
        shared=config.integer("n_shared_experts", default=shared) * spec.d_expert,
        kv_values=kv,
        window=window if windowed else 0,
        windowed_values=windowed,
        tied=config.flag("tie_word_embeddings", False),
    )


def _softmax(config: Settings) -> RouterFacts:
    grouped = config.value("topk_method", default="greedy") == "group_limited_greedy"
    return RouterFacts(
        "softmax",
        scale=config.number("routed_scaling_factor", 1.0),
        groups=config.integer("n_group") if grouped else 1,
        groups_kept=config.integer("topk_group") if grouped else 1,
    )


def _sigmoid(config: Settings) -> RouterFacts:
    v3, dots = config.model_type == "deepseek_v3", config.model_type == "dots1"
    return RouterFacts(
        "sigmoid",
        renormalised=config.flag("norm_topk_prob", not dots),
        scale=config.number("routed_scaling_factor", 2.5 if v3 else 1.0),
        groups=config.integer("n_group", default=8 if v3 else 1),
        groups_kept=config.integer("topk_group", default=4 if v3 else 1),
        selection_bias=True,
    )


def _kv(config: Settings, depth: int) -> tuple[int, int, int]:
    """Numbers cached per token, the sliding window, and the part of the numbers that it bounds."""
    if config.model_type in ("deepseek_v2", "deepseek_v3"):  # the compressed form is what transformers caches
        per_layer = config.integer("kv_lora_rank", default=512) + config.integer("qk_rope_head_dim", default=64)
        return per_layer * depth, 0, 0
    dots = config.model_type == "dots1"
    per_layer = 2 * config.kv_heads(32 if dots else 8) * config.head_dim()
    if not dots or ("sliding_window" in config.data and config.data["sliding_window"] is None):
        return per_layer * depth, 0, 0
    kinds = config.value("layer_types", default=None)
    below = config.integer("max_window_layers", default=62)
    windowed = sum(k == "sliding_attention" for k in kinds) if kinds else max(0, depth - below)
    return per_layer * depth, config.integer("sliding_window", default=4096), per_layer * windowed
