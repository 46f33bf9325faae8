"""Dense Llama-like checkpoints seen as Mixtral ones: which qualify, the configuration, and the names of tensors.

A Mixtral decoder is Llama's (and Mistral's) with the feed-forward replaced, so everything else carries over unchanged.
Many other families use Llama's tensor names with another arithmetic (other norms, scaled embeddings, layers without rope),
so a checkpoint qualifies by the class it declares, its options *and* its tensors. Source: transformers 5.23, models/{llama,mistral,mixtral}.
"""

from __future__ import annotations

import re
from typing import Any

from moestro.core.errors import CheckpointError, InputError, UnsupportedModel
from moestro.models.checkpoint import Checkpoint

DENSE, FORMAT = "llama", "mixtral"
ATTENTION = tuple(f"self_attn.{p}_proj.weight" for p in "qkvo") + ("input_layernorm.weight", "post_attention_layernorm.weight")
# An expert's matrix in Mixtral <- the same matrix of the dense feed-forward, in the order in which they are written.
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# What transformers assumes when config.json leaves a field out; it differs between the classes, so the new file states everything.
_SHARED = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _SHARED
    | {"intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "MistralForCausalLM": _SHARED
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
ROPE_THETA = 10000.0  # the dense classes' default; Mixtral's is 1e6
# Options that are not arithmetic of the dense classes when they have these values, and that Mixtral cannot express otherwise.
_NEUTRAL = {"attention_bias": (False, None), "mlp_bias": (False, None), "partial_rotary_factor": (None, 1, 1.0)}
_IGNORED = ("quantization_config", "auto_map")
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def dense_name(layer: int, matrix: str) -> str:
    """The dense tensor that becomes `matrix` ('w1', 'w2' or 'w3') of every expert of decoder layer `layer`."""
    return f"model.layers.{layer}.mlp.{MATRICES[matrix]}.weight"


def expert_name(layer: int, expert: int, matrix: str) -> str:
    """A Mixtral expert's tensor on disk: w1 gate [F, D], w3 up [F, D], w2 down [D, F]."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def router_name(layer: int) -> str:
    """A Mixtral router's tensor on disk, [E, D]."""
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def buffers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Tensors of old dense checkpoints that the model computes itself and never loads."""
    return tuple(name for name in checkpoint.tensors if _BUFFER.fullmatch(name))


def check_dense(checkpoint: Checkpoint) -> None:
    """Raises UnsupportedModel unless Mixtral's arithmetic around the experts is exactly this model's, CheckpointError when tensors are missing or misshapen."""
    config = checkpoint.config
    declared = config.get("architectures") or ["no class"]
    if len(declared) != 1 or declared[0] not in DEFAULTS:
        raise _unsupported(checkpoint, f"is a {', '.join(map(str, declared))}", "one of " + ", ".join(DEFAULTS))
    for key in _IGNORED:
        if config.get(key):
            raise _unsupported(checkpoint, f"has {key} in its config.json", "plain float weights and transformers' own code")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise _unsupported(checkpoint, f"has {key} = {config[key]!r}", f"{key} = {neutral[0]!r}, Mixtral has no such option")
    layers = range(_settings(config)["num_hidden_layers"])
    needed = {"model.embed_tokens.weight", "model.norm.weight"}
    needed |= {f"model.layers.{i}.{part}" for i in layers for part in ATTENTION}
    needed |= {dense_name(i, m) for i in layers for m in MATRICES}
    tied = bool(config.get("tie_word_embeddings", False))
    optional = {"lm_head.weight"} if tied else set()
    needed |= set() if tied else {"lm_head.weight"}
    found = set(checkpoint.tensors) - set(buffers(checkpoint))
    if extra := sorted(found - needed - optional):
        raise _unsupported(
            checkpoint, f"has {len(extra)} tensors that Mixtral has no place for, such as {extra[0]}", "a plain decoder"
        )
    if missing := sorted(needed - found):
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors, such as {missing[0]}",
            expected=f"every tensor of {len(layers)} layers",
            fix="download the checkpoint again",
        )
    d, f = _settings(config)["hidden_size"], _settings(config)["intermediate_size"]
    for i in layers:
        for matrix in MATRICES:
            ref = checkpoint.tensors[dense_name(i, matrix)]
            if ref.dtype not in ("F32", "F16", "BF16"):
                raise _unsupported(checkpoint, f"stores {ref.name} as {ref.dtype}", "float32, float16 or bfloat16 weights")
            if ref.shape != ((d, f) if matrix == "w2" else (f, d)):
                raise CheckpointError(f"{ref.name} has shape {list(ref.shape)}", expected=f"the config's {[f, d]}, down {[d, f]}")


def moe_config(config: dict[str, Any], *, experts: int, top_k: int) -> dict[str, Any]:
    """The Mixtral config.json of a dense one. Raises InputError when `experts` and `top_k` make no MoE."""
    if experts < 1 or not 1 <= top_k <= experts:
        raise InputError(f"experts = {experts}, top_k = {top_k}", expected="1 <= top_k <= experts")
    out = _settings(config)
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.setdefault("rope_theta", float(config.get("rope_theta") or ROPE_THETA))
    out |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": FORMAT,
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "rope_parameters": rope,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }
    # Readers older than transformers 5 (and vLLM, llama.cpp) look here.
    out["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        out["rope_scaling"] = rope
    return out


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The dense options that Mixtral shares, with the dense class's own defaults filled in."""
    defaults = DEFAULTS[config["architectures"][0]]
    out = {key: config.get(key, value) for key, value in defaults.items()}
    if out["num_key_value_heads"] is None:
        out["num_key_value_heads"] = out["num_attention_heads"]
    if out["head_dim"] is None:
        out["head_dim"] = out["hidden_size"] // out["num_attention_heads"]
    return out


def _unsupported(checkpoint: Checkpoint, what: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{checkpoint.source} {what}, so a Mixtral model made of it would not compute the same",
        expected=expected,
        fix="start from a Llama or Mistral model without these",
    )
