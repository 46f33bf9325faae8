"""Tiny random models of every family, and their checkpoints in every layout found on disk. Needs torch and transformers.

The weights are scaled so that routing spreads over the experts; biases, sinks and correction biases are far from zero,
so that code which forgets them fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

_BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIGMOID = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
}
_SOFTMAX = {"intermediate_size": 24, "num_experts_per_tok": 2}
_CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "mixtral": ("mixtral", _SOFTMAX | {"num_local_experts": 4, "sliding_window": None}),
        "qwen2_moe": (
            "qwen2_moe",
            {
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 24,
                "num_experts": 6,
                "num_experts_per_tok": 3,
                "mlp_only_layers": [1],
            },
        ),
        "qwen3_moe": (
            "qwen3_moe",
            {
                "intermediate_size": 48,
                "moe_intermediate_size": 16,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "head_dim": 8,
                "norm_topk_prob": True,
                "mlp_only_layers": [0],
            },
        ),
        "olmoe": ("olmoe", {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 4}),
        "flex_olmo": ("flex_olmo", _SOFTMAX | {"num_experts": 5}),
        "deepseek_v2": (
            "deepseek_v2",
            _SIGMOID | _MLA | {"n_group": None, "topk_group": None, "topk_method": "greedy", "norm_topk_prob": False},
        ),
        "deepseek_v2_groups": (
            "deepseek_v2",
            _SIGMOID | _MLA | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        ),
        "deepseek_v3": ("deepseek_v3", _SIGMOID | _MLA),
        "glm4_moe": ("glm4_moe", _SIGMOID | {"n_group": 1, "topk_group": 1, "head_dim": 8, "use_qk_norm": True}),
        "dots1": ("dots1", _SIGMOID | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "head_dim": 8}),
        "gpt_oss": (
            "gpt_oss",
            {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"head_dim": 16, "sliding_window": 8},
        ),
        "granitemoe": (
            "granitemoe",
            _SOFTMAX
            | {"num_local_experts": 5, "embedding_multiplier": 1.5, "residual_multiplier": 0.7}
            | {"attention_multiplier": 0.3, "logits_scaling": 2.0},
        ),
        "granitemoeshared": (
            "granitemoeshared",
            _SOFTMAX
            | {"num_local_experts": 4, "shared_intermediate_size": 20, "embedding_multiplier": 1.5}
            | {"residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0},
        ),
        "phimoe": ("phimoe", _SOFTMAX | {"num_local_experts": 4, "router_jitter_noise": 0.3}),
        "llama4_text": (
            "llama4_text",
            {"intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "head_dim": 8, "attention_chunk_size": 64},
        ),
        "lfm2_moe": (
            "lfm2_moe",
            {"intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
            | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "routed_scaling_factor": 1.3},
        ),
        "ernie4_5_moe": (
            "ernie4_5_moe",
            {"intermediate_size": 48, "moe_intermediate_size": 16, "moe_num_experts": 6, "moe_k": 2}
            | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
        ),
        "jamba": (
            "jamba",
            _SOFTMAX
            | {"num_hidden_layers": 4, "num_experts": 4, "attn_layer_period": 4, "attn_layer_offset": 2}
            | {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_dt_rank": 4},
        ),
        "hunyuan_v1_moe": ("hunyuan_v1_moe", _SOFTMAX | {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
        "minimax_m2": (
            "minimax_m2",
            {"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 8, "rotary_dim": 4},
        ),
    }
)
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
_HUB_FUSED = ("granitemoe", "granitemoeshared")  # fused on the Hub too, under other names than in memory
_ONE_NAMING = ("gpt_oss", "llama4_text")  # the same fused names on disk and in memory
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def layouts(family: str) -> tuple[str, ...]:
    """The layouts that `save_tiny` can write for a family: 'per_expert', 'fused', 'memory' (fused, names as in memory), 'mxfp4'."""
    if family in _HUB_FUSED:
        return ("fused", "memory")
    if family in _ONE_NAMING:
        return ("fused", "mxfp4") if family == "gpt_oss" else ("fused",)
    return ("per_expert", "fused")


def tiny_config(family: str, **changes: Any) -> Any:
    """The transformers configuration of a tiny model; `changes` override or add any of its fields."""
    from transformers import AutoConfig

    model_type, fields = _CONFIGS[family]
    return AutoConfig.for_model(model_type, **(_BASE | fields | changes))


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """A tiny random float32 transformers module in evaluation mode. family: one of FAMILIES."""
    from transformers import AutoModelForCausalLM

    return randomise(AutoModelForCausalLM.from_config(tiny_config(family, **changes)), seed)


def randomise(module: Any, seed: int = 0) -> Any:
    """Give a module float32 random weights under which routing is spread out and no bias is negligible."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    module = module.float().eval()
    with torch.no_grad():
        named = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n.endswith("bias"))]
        for name, tensor in named:
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("A_log", "D") or ".dt_" in name:
                continue  # a state-space mixer is only stable near its own initialisation
            noise = torch.randn(tensor.shape, generator=generator)
            if "bias" in leaf or leaf == "sinks":
                tensor.copy_(0.2 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.1 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise)
            else:
                fan_in = tensor.shape[-2] if getattr(_owner(module, name), "is_transposed", False) else tensor.shape[-1]
                router = ".gate." in name or ".router." in name
                tensor.copy_(noise * (2.5 if router else 1.0) / math.sqrt(fan_in))
    return module


def _owner(module: Any, name: str) -> Any:
    return module.get_submodule(name.rpartition(".")[0])


def save_tiny(
    family: str,
    folder: str | Path,
    layout: str | None = None,
    dtype: str = "float32",
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Any:
    """Write a tiny checkpoint with a tokenizer and return the float32 module whose weights are exactly those on disk.

    layout: one of layouts(family), by default the Hub's. dtype: 'float32', 'float16' or 'bfloat16'.
    """
    layout = layout or layouts(family)[0]
    assert layout in layouts(family), f"{family} has no layout {layout!r}"
    module = tiny_model(family, seed=seed, **changes)
    write(module, folder, original=layout not in ("memory",) and not (layout == "fused" and "per_expert" in layouts(family)),
          mxfp4=layout == "mxfp4", dtype=dtype, max_shard_size=max_shard_size)  # fmt: skip
    return module


def write(
    module: Any,
    folder: str | Path,
    *,
    original: bool = True,
    mxfp4: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> None:
    """Save a module (its float32 values are rounded in place to what is written). original: the Hub's names, not memory's."""
    import torch

    folder = Path(folder)
    target = getattr(torch, dtype)
    keep = tuple(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) + ("expert_bias", "e_score_correction_bias")
    with torch.no_grad():
        tensors = dict([*module.named_parameters(), *module.named_buffers()])
        kept = {name: t.clone() for name, t in tensors.items() if any(k in name for k in keep) or "rotary" in name}
        for name, tensor in tensors.items():
            if name not in kept:
                tensor.copy_(tensor.to(target).float())
        blocks = _to_mxfp4(module) if mxfp4 else {}
        module.to(target)
        for name, tensor in kept.items():
            owner, leaf = _owner(module, name), name.rpartition(".")[2]
            store = owner._parameters if leaf in owner._parameters else owner._buffers
            store[leaf] = torch.nn.Parameter(tensor, requires_grad=False) if leaf in owner._parameters else tensor
        state = {k: v for k, v in module.state_dict().items() if not (blocks and ".experts." in k and not k.endswith("_bias"))}
        module.save_pretrained(
            folder, state_dict=state | blocks, save_original_format=original and not mxfp4, max_shard_size=max_shard_size
        )
        module.float()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = dtype
    if mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "self_attn", "router"]}
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    write_tokenizer(folder, int(config["vocab_size"]))


def _to_mxfp4(module: Any) -> dict[str, Any]:
    """Round every experts' matrix to MXFP4 in place and return its blocks and scales under the Hub's names."""
    import torch

    out: dict[str, Any] = {}
    for name, tensor in module.named_parameters():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            continue
        w_ERC = tensor.detach().transpose(1, 2).numpy()  # output rows first
        groups = w_ERC.reshape(*w_ERC.shape[:2], -1, 32)
        power = np.floor(np.log2(np.abs(groups).max(-1, keepdims=True) + 1e-30)) - 2
        nibble = np.abs(groups[..., None] / 2.0 ** power[..., None] - _FP4).argmin(-1).astype(np.uint8)
        rounded = (_FP4[nibble] * 2.0**power).astype(np.float32).reshape(w_ERC.shape)
        tensor.copy_(torch.from_numpy(rounded).transpose(1, 2))
        out[name + "_blocks"] = torch.from_numpy(np.ascontiguousarray(nibble[..., 0::2] | (nibble[..., 1::2] << 4)))
        out[name + "_scales"] = torch.from_numpy((power[..., 0] + 127).astype(np.uint8))
    return out


def write_tokenizer(folder: str | Path, vocab_size: int = 128) -> None:
    """A tokenizer of single ASCII characters with a chat template: 0 <pad>, 1 <s>, 2 </s>, 3 <unk>, then the characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    characters = ["\n", "\t", *(chr(c) for c in range(32, 127))]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    names = [*special, *characters]
    names += [f"<extra_{i}>" for i in range(vocab_size - len(names))]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(n, special=True) for n in special])
    tokenizer.decoder = decoders.Fuse()
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": template}, indent=1), "utf-8")
