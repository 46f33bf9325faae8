"""Export of trained models to Hugging Face families, where the configuration is expressible. Needs torch; to verify, transformers.

A family is a row: what it can express, its config.json and its tensor names. What a family always has and the model has not becomes
weights that change nothing: a shared expert of zeros, a correction bias of zeros, an ungated shared expert as twice itself under a
gate of one half. After writing, the logits are compared with transformers'.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.layer import RouterFacts
from moestro.models.checkpoint import Checkpoint
from moestro.models.trained import as_array
from moestro.models.writer import CheckpointWriter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from moestro.layers.block import MoEBlock
    from moestro.layers.config import MoEConfig
    from moestro.layers.router import StagedRouter

TOLERANCE = 1e-3  # of the largest logit difference after export in float32, relative to the largest logit


@dataclass(frozen=True, slots=True)
class Family:
    """One Hugging Face family. refuses(config, facts): what it cannot express, in words. extra(config, facts): its own settings.

    moe, shared, experts: prefixes of its tensors inside a layer; parts: gate, up and down. bias: it has a correction bias.
    """

    model_class: str
    refuses: Callable[[MoEConfig, RouterFacts], Iterator[str]]
    extra: Callable[[MoEConfig, RouterFacts], dict[str, Any]]
    moe: str = "mlp"
    shared: str = ""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    bias: bool = False
    gated_shared: bool = False


def export(module: nn.Module, folder: str | Path, family: str = "auto", *, dtype: str = "float32", overwrite: bool = False,
           verify: bool = True) -> Checkpoint:  # fmt: skip
    """Write a trained model as a Hugging Face checkpoint. family: one of `FAMILIES`, or 'auto' for the first that can express it.

    Raises UnsupportedModel: no family (or not this one) can express it; the message says why. CheckpointError: transformers computes
    other logits from the result, which is removed then. StorageError: the folder cannot be written.
    """
    c, facts = _config(module), _facts(module)
    if family != "auto" and family not in FAMILIES:
        raise UnsupportedModel(f"no export to {family!r}", expected="auto, " + ", ".join(FAMILIES))
    tried = {name: list(FAMILIES[name].refuses(c, facts)) for name in (FAMILIES if family == "auto" else [family])}
    able = [name for name, reasons in tried.items() if not reasons]
    if not able:
        why = "\n  ".join(f"{name} has no {', no '.join(reasons)}" for name, reasons in tried.items())
        raise UnsupportedModel(
            "the model cannot be written as a Hugging Face family", expected=why, fix="keep moestro's own format"
        )
    name = able[0]
    row = FAMILIES[name]
    config = _common(c) | {"model_type": name, "architectures": [row.model_class], "dtype": dtype} | row.extra(c, facts)
    with CheckpointWriter(folder, config, overwrite=overwrite) as writer:
        for key, tensor in _tensors(module, c, row):
            writer.add(key, *as_array(tensor, "float32" if key.endswith("correction_bias") else dtype))
        written = writer.finish()
    if verify:
        _verify(module, written, dtype)
    return written


def _config(module: nn.Module) -> MoEConfig:
    c: MoEConfig = module.config  # type: ignore[assignment]
    for field, plain in (("architecture", "decoder"), ("block", "routed"), ("experts", "stacked")):
        found = getattr(c, field).name.rsplit(".", 1)[-1]
        if found != plain:
            raise UnsupportedModel(f"the {field} {found!r} has no Hugging Face family", expected=plain)
    if c.special or not c.gated or c.bias or c.activation != "silu":
        raise UnsupportedModel(
            "these experts have no Hugging Face family", expected="gated silu experts without bias, no special ones"
        )
    if not c.moe_layers:
        raise UnsupportedModel("a model without an MoE layer")
    return c


def router_facts(router: StagedRouter) -> RouterFacts:
    """What a router does in evaluation, in the words of the Hugging Face families. Raises UnsupportedModel."""
    import torch
    from torch import nn

    from moestro.layers.routers.deepseek_v3 import GroupLimit
    from moestro.layers.stages import Combine, TopK, sigmoid, softmax
    from moestro.layers.taps.capacity import Capacity
    from moestro.layers.taps.loss_free import LossFree

    def no(what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{what} has no Hugging Face family", fix="keep moestro's own format")

    gate, combine = getattr(router.score, "gate", None), router.combine
    if not isinstance(gate, nn.Linear) or gate.bias is not None:
        raise no(f"a router that scores with {type(router.score).__name__}")
    if not isinstance(router.select, TopK) or router.normalise not in (softmax, sigmoid):
        raise no(f"a router that selects by {type(router.select).__name__} of {getattr(router.normalise, '__name__', '?')}")
    if not isinstance(combine, Combine) or combine.convention not in ("raw", "renormalised", "softmax"):
        raise no(f"the combine convention {router.convention!r}")
    score = "softmax" if router.normalise is softmax else "sigmoid"
    if combine.convention == "softmax" and score != "softmax":
        raise no("a softmax after a sigmoid choice")
    groups, kept, biased = 1, 1, False
    for tap in router.taps:
        fn = tap.fn
        if isinstance(fn, GroupLimit):
            groups, kept = fn.groups, fn.kept
        elif isinstance(fn, LossFree):
            biased = bool(torch.count_nonzero(fn.bias_E)) or biased
        elif not (isinstance(fn, Capacity) and not fn.evaluate_factor):
            raise no(f"the tap {type(fn).__name__} in evaluation" + (" (a capacity)" if isinstance(fn, Capacity) else ""))
    return RouterFacts(
        score,
        renormalised=combine.convention != "raw",
        scale=combine.scale,
        groups=groups,
        groups_kept=kept,
        selection_bias=biased,
    )


def _facts(module: nn.Module) -> RouterFacts:
    """One description for all layers; a bias in any layer counts."""
    from dataclasses import replace

    found = [router_facts(block.router) for _, block in _moe_blocks(module)]
    facts = replace(found[0], selection_bias=any(f.selection_bias for f in found))
    if any(replace(f, selection_bias=facts.selection_bias) != facts for f in found):
        raise UnsupportedModel("routers that differ between layers have no Hugging Face family")
    return facts


def _moe_blocks(module: nn.Module) -> Iterator[tuple[int, MoEBlock]]:
    from moestro.layers.block import MoEBlock

    for i, layer in enumerate(module.layers):  # type: ignore[union-attr,arg-type]
        if isinstance(layer.block, MoEBlock):
            yield i, layer.block


def _common(c: MoEConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocabulary,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.key_heads,
        "head_dim": c.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
        "num_experts_per_tok": c.top_k,
        "initializer_range": c.init_std,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _tensors(module: Any, c: MoEConfig, row: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the family with its name."""
    from moestro.layers.block import MoEBlock

    yield "model.embed_tokens.weight", module.embedding.weight
    yield "model.norm.weight", module.norm.weight
    if not c.tied:
        yield "lm_head.weight", module.head.weight
    for i, layer in enumerate(module.layers):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", layer.mixer_norm.weight
        yield at + "post_attention_layernorm.weight", layer.block_norm.weight
        yield from ((f"{at}self_attn.{name}", value) for name, value in _mixer(layer.mixer, c))
        if isinstance(layer.block, MoEBlock):
            yield from ((at + name, value) for name, value in _moe(layer.block, c, row))
        else:
            bank = layer.block.feed_forward.bank
            yield from ((f"{at}mlp.{name}.weight", value) for name, value in zip(row.parts, _matrices(bank, 0), strict=True))


def _moe(block: MoEBlock, c: MoEConfig, row: Family) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    from moestro.layers.taps.loss_free import LossFree

    yield f"{row.moe}.gate.weight", block.router.score.gate.weight  # type: ignore[union-attr]
    for e in range(block.experts.num):
        for name, value in zip(row.parts, _matrices(block.experts, e), strict=True):
            yield f"{row.moe}.experts.{e}.{name}.weight", value
    if row.bias:
        biases = [tap.fn.bias_E for tap in block.router.taps if isinstance(tap.fn, LossFree)]
        total = torch.stack(biases).sum(0) if biases else torch.zeros(block.experts.num)
        yield f"{row.moe}.gate.e_score_correction_bias", total
    if not row.shared:
        return
    if block.shared is None:
        width = _zero_width(c, row)
        gate, up, down = torch.zeros(width, c.d_model), torch.zeros(width, c.d_model), torch.zeros(c.d_model, width)
        own = None
    else:
        gate, up, down = _matrices(block.shared.bank, 0)  # type: ignore[union-attr]
        own = block.shared.gate
    if row.gated_shared:
        yield f"{row.moe}.shared_expert_gate.weight", torch.zeros(1, c.d_model) if own is None else own.weight  # type: ignore[union-attr]
        down = down if own is not None else 2 * down
    for name, value in zip(row.parts, (gate, up, down), strict=True):
        yield f"{row.moe}.{row.shared}.{name}.weight", value


def _zero_width(c: MoEConfig, row: Family) -> int:
    """The width of the shared expert of zeros that stands for none."""
    return 32 if row.gated_shared else c.d_expert


def _matrices(bank: Any, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = bank.weights(e)
    return w.gate_FD, w.up_FD, w.down_DF


def _mixer(mixer: Any, c: MoEConfig) -> Iterator[tuple[str, torch.Tensor]]:
    if not _latent(c):
        yield from mixer.state_dict().items()
        return
    heads, nope, rope, rank = mixer.heads, mixer.nope, mixer.rope, mixer.kv_rank
    state = dict(mixer.state_dict())
    q = state.pop("q_proj.weight").view(heads, nope + rope, -1)
    yield ("q_b_proj" if mixer.q_rank else "q_proj") + ".weight", _neighbours(q, nope).flatten(0, 1)
    yield "kv_a_proj_with_mqa.weight", _neighbours(state.pop("kv_a_proj.weight")[None], rank)[0]
    yield from state.items()


def _neighbours(weight_HRX: torch.Tensor, first: int) -> torch.Tensor:
    """Reorder the rotary rows (from `first` on) from halves (w, w + W/2) to neighbours (2w, 2w + 1), as DeepSeek stores them."""
    import torch

    fixed, turned = weight_HRX[:, :first], weight_HRX[:, first:]
    return torch.cat((fixed, torch.stack(turned.chunk(2, 1), 2).flatten(1, 2)), 1)


def _latent(c: MoEConfig) -> bool:
    return c.mixer.name.rsplit(".", 1)[-1] == "mla"


def _verify(module: nn.Module, written: Checkpoint, dtype: str) -> None:
    """Compare logits with transformers'. In 16 bits only the size of the difference that rounding makes is allowed."""
    import torch

    from moestro.models.open import open_model

    c: MoEConfig = module.config  # type: ignore[assignment]
    tokens = torch.randint(0, c.vocabulary, (2, min(16, c.context)), generator=torch.Generator().manual_seed(0))
    training = module.training
    try:
        with torch.no_grad():
            ours = module.eval()(tokens).logits_BTV
            theirs = open_model(written, "float32").module(input_ids=tokens).logits
    finally:
        module.train(training)
    off = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-6))
    if off > TOLERANCE * (1 if dtype == "float32" else 100):
        shutil.rmtree(written.path)
        raise CheckpointError(
            f"transformers computes other logits from {written.path}: off by {off:.2g} of the largest",
            expected=f"at most {TOLERANCE:g}",
            fix="report this: the export is wrong",
        )


def _softmax_refusals(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    if _latent(c):
        yield "latent attention"
    if f.score != "softmax":
        yield "sigmoid scores"
    if f.scale != 1:
        yield "scaled weights"
    if f.groups > 1 or f.selection_bias:
        yield "groups or bias in the choice"


def _mixtral(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _softmax_refusals(c, f)
    if not f.renormalised and c.top_k < c.num_experts:
        yield "raw weights"
    if c.d_shared:
        yield "shared expert"
    if c.dense_layers:
        yield "dense layers"
    if c.qk_norm != "none":
        yield "norms of queries and keys"


def _olmoe(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _softmax_refusals(c, f)
    if c.d_shared:
        yield "shared expert"
    if c.dense_layers:
        yield "dense layers"
    if c.qk_norm != "full":
        yield f"attention with qk_norm {c.qk_norm}"
    if c.head_width * c.heads != c.d_model:
        yield "heads of their own width"


def _qwen3(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _softmax_refusals(c, f)
    if c.d_shared:
        yield "shared expert"
    if c.qk_norm != "head":
        yield f"attention with qk_norm {c.qk_norm}"


def _qwen2(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _softmax_refusals(c, f)
    if c.qk_norm != "none":
        yield "norms of queries and keys"
    if c.head_width * c.heads != c.d_model:
        yield "heads of their own width"


def _shared_refusals(c: MoEConfig) -> Iterator[str]:
    if c.dense_layers != tuple(range(len(c.dense_layers))):
        yield "dense layers but the first"
    if c.d_shared % c.d_expert:
        yield "shared expert that is no multiple of an expert"
    if c.d_shared and c.shared_gate:
        yield "gate on the shared expert"


def _glm4(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _shared_refusals(c)
    if _latent(c):
        yield "latent attention"
    if f.score != "sigmoid":
        yield "softmax scores"
    if c.qk_norm == "full":
        yield "norms over all heads"


def _deepseek_v3(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _shared_refusals(c)
    if not _latent(c):
        yield "attention without a latent"
    if f.score != "sigmoid":
        yield "softmax scores"


def _deepseek_v2(c: MoEConfig, f: RouterFacts) -> Iterator[str]:
    yield from _shared_refusals(c)
    if not _latent(c):
        yield "attention without a latent"
    if f.score != "softmax":
        yield "sigmoid scores"
    if f.renormalised or f.selection_bias:
        yield "renormalised weights or bias in the choice"
    if f.groups > 1:
        yield "groups that score by the sum of two"


def _normalised(c: MoEConfig, f: RouterFacts) -> dict[str, Any]:
    return {"norm_topk_prob": f.renormalised}


def _qwen_extra(c: MoEConfig, f: RouterFacts) -> dict[str, Any]:
    return _normalised(c, f) | {
        "num_experts": c.num_experts,
        "moe_intermediate_size": c.d_expert,
        "intermediate_size": c.dense_width,
        "mlp_only_layers": list(c.dense_layers),
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
    }


def _grouped_extra(c: MoEConfig, f: RouterFacts) -> dict[str, Any]:
    return _normalised(c, f) | {
        "n_routed_experts": c.num_experts,
        "n_shared_experts": max(1, c.d_shared // c.d_expert),
        "moe_intermediate_size": c.d_expert,
        "intermediate_size": c.dense_width,
        "first_k_dense_replace": len(c.dense_layers),
        "n_group": f.groups,
        "topk_group": f.groups_kept,
        "routed_scaling_factor": f.scale,
        "attention_bias": False,
    }


def _latent_extra(c: MoEConfig, f: RouterFacts) -> dict[str, Any]:
    o, width = c.mixer.options, c.head_width
    return _grouped_extra(c, f) | {
        "kv_lora_rank": o.get("kv_rank", 32),
        "q_lora_rank": o.get("q_rank", 0) or None,
        "qk_rope_head_dim": width,
        "qk_nope_head_dim": o.get("d_nope", 0) or width,
        "v_head_dim": o.get("d_value", 0) or width,
    }


FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM",
        _mixtral,
        lambda c, f: {"num_local_experts": c.num_experts, "intermediate_size": c.d_expert, "sliding_window": None},
        moe="block_sparse_moe",
        parts=("w1", "w3", "w2"),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _olmoe,
        lambda c, f: _normalised(c, f) | {"num_experts": c.num_experts, "intermediate_size": c.d_expert},
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _qwen3, _qwen_extra),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _qwen2,
        lambda c, f: _qwen_extra(c, f) | {"shared_expert_intermediate_size": c.d_shared or 32, "qkv_bias": False},
        shared="shared_expert",
        gated_shared=True,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        _glm4,
        lambda c, f: (
            _grouped_extra(c, f)
            | {
                "use_qk_norm": c.qk_norm == "head",
                "partial_rotary_factor": 1.0,
                "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 1.0},
            }
        ),
        shared="shared_experts",
        bias=True,
    ),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", _deepseek_v3, _latent_extra, shared="shared_experts", bias=True),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        _deepseek_v2,
        lambda c, f: _latent_extra(c, f) | {"topk_method": "greedy"},
        shared="shared_experts",
    ),
}
