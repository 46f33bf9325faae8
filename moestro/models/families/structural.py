"""Model classes without a family file: described from the live transformers class itself, and refused unless numbers agree.

A class qualifies when its experts carry transformers' experts decorator and its expert tensors have plain names. Its
arithmetic is found by trying it: the activation, the top-k, the router's score and the cache's size are measured, and one
expert from the checkpoint must give what the class's own code gives.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moestro.core.errors import UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertSpec
from moestro.core.layer import LayerFacts, RouterFacts
from moestro.core.routing import RouteContext
from moestro.models.checkpoint import Checkpoint
from moestro.models.families.block import LEAVES, Block, layout
from moestro.models.families.settings import ACTIVATIONS, Settings
from moestro.models.layout import Layout, Part

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_PLAIN = ("MergeModulelist", "Concatenate")  # conversions that only stack experts and put gate before up


def describe(checkpoint: Checkpoint, settings: Settings) -> Layout:
    """As families.describe, for a class that has no file. Raises UnsupportedModel with the reason."""
    import torch
    from transformers import initialization

    from moestro.models.live import has_hook, model_class, skeleton

    cls, config = model_class(checkpoint)
    module = skeleton(checkpoint, "float32")
    found = {}
    for name, experts in module.named_modules():
        if has_hook(experts) and (at := _LAYER.search(name)):
            found[int(at[1])] = (name, experts)
    if not found:
        raise UnsupportedModel(
            f"no layer of this {settings.model_type} has experts that can be replaced",
            expected="a Mixture-of-Experts class with transformers' use_experts_implementation",
            fix="use another model",
        )
    _plain_names(module, checkpoint)
    index = min(found)
    name, experts = found[index]
    counts = {e.num_experts for _, e in found.values()}
    if len(counts) > 1:
        raise UnsupportedModel(f"the number of experts differs between layers: {sorted(counts)}", expected="one number")
    spec = _spec(experts)
    with torch.no_grad(), initialization.no_init_weights():
        top_k, router, shared = _try_block(module, name, experts, spec)
        kv, state = _cache(cls, config)
    sizes = {k: getattr(config, k) for k in ("num_hidden_layers", "vocab_size", "max_position_embeddings") if hasattr(config, k)}
    dtype = settings.data.get("dtype") or settings.data.get("torch_dtype")
    full = Settings(config.to_dict() | sizes | {"dtype": dtype}, settings.where)
    block = Block(
        experts=counts.pop(),
        top_k=top_k,
        spec=spec,
        router=router,
        layers=tuple(sorted(found)),
        kv_values=kv,
        state_values=state,
        shared=shared,
        tied="lm_head.weight" in module.all_tied_weights_keys,
        transposed=bool(experts.is_transposed),
        interleaved=not experts.is_concatenated,
        ignored=tuple(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ()),
        extra={"described": "from the transformers class"},
    )
    made = layout(checkpoint, full, block)
    with torch.no_grad():
        _try_expert(checkpoint, made, experts, spec)
    return made


def _plain_names(module: Any, checkpoint: Checkpoint) -> None:
    """transformers' own conversion of the expert tensors must be stacking and nothing else, with our reading of the names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for rule in get_model_conversion_mapping(module):
        if not isinstance(rule, WeightConverter) or not any(rule.compiled_sources.search(name) for name in checkpoint.tensors):
            continue
        kinds = [type(operation).__name__ for operation in rule.operations]
        leaves = [re.split(r"\\?\.", pattern.removesuffix(".weight"))[-1].rstrip("\\") for pattern in rule.source_patterns]
        roles = [LEAVES.get(leaf, "?") for leaf in leaves]
        if any(kind not in _PLAIN for kind in kinds) or roles not in (["gate", "up"], ["down"], ["up"]):
            raise UnsupportedModel(
                f"transformers rewrites {', '.join(rule.source_patterns)} by {', '.join(kinds)} when it loads this model",
                expected="expert tensors that are only stacked",
                fix="use another model",
            )


def _spec(experts: Any) -> ExpertSpec:
    """Sizes from the parameters, the activation by comparing values."""
    import torch

    if experts.has_post_expert_norm:
        raise UnsupportedModel(f"{type(experts).__name__} normalises each expert's output, which moestro does not do")
    first, down = (experts.gate_up_proj if experts.has_gate else experts.up_proj), experts.down_proj
    d_model, d_expert = (down.shape[2], down.shape[1]) if experts.is_transposed else (down.shape[1], down.shape[2])
    if first.shape[1] * first.shape[2] != d_model * d_expert * (2 if experts.has_gate else 1):
        raise UnsupportedModel(f"{type(experts).__name__} has parameters of unusual shapes: {list(first.shape)}")
    base = ExpertSpec(int(d_model), int(d_expert), gated=bool(experts.has_gate), bias=bool(experts.has_bias))
    tried = [replace(base, activation=name) for name in dict.fromkeys(ACTIVATIONS.values())]
    if base.gated and isinstance(getattr(experts, "limit", None), int | float):
        limits = {"limit": float(experts.limit), "alpha": float(getattr(experts, "alpha", 1.0))}
        tried.append(replace(base, activation="swiglu_clamped", **limits))
    x = 4 * torch.randn(64, base.d_expert * (2 if base.gated else 1), generator=torch.Generator().manual_seed(0))
    theirs = experts._apply_gate(x) if base.gated else experts.act_fn(x)
    for spec in tried:
        if torch.allclose(_activated(x, spec, not experts.is_concatenated), theirs, atol=1e-5, rtol=1e-5):
            return spec
    raise UnsupportedModel(
        f"the gate of {type(experts).__name__} is none that moestro knows",
        expected=", ".join(dict.fromkeys(ACTIVATIONS.values())),
    )


def _activated(x: torch.Tensor, spec: ExpertSpec, interleaved: bool) -> torch.Tensor:
    from moestro.models.experts import gated

    if not spec.gated:
        return gated(None, x, spec)
    gate, up = (x[:, 0::2], x[:, 1::2]) if interleaved else x.chunk(2, -1)
    return gated(gate, up, spec)


def _try_block(module: Any, name: str, experts: Any, spec: ExpertSpec) -> tuple[int, RouterFacts, int]:
    """Run one block with random weights: top_k, the router's facts, the shared width. The block must be experts plus shared."""
    import torch

    from moestro.models.live import Seam
    from moestro.models.router import Wire, answering, without_experts

    path = name.rpartition(".")[0]
    block, decoder = module.get_submodule(path), module.get_submodule(path[: _LAYER.search(path + ".").end() - 1])  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    inside = {id(p) for p in experts.parameters()}
    for part in block.modules():
        for store in (part._parameters, part._buffers):
            for key, tensor in store.items():
                if tensor is not None and id(tensor) not in inside and tensor.is_floating_point():
                    value = torch.randn(tensor.shape, generator=generator) / max(1, tensor.shape[-1]) ** 0.5
                    store[key] = torch.nn.Parameter(value) if store is part._parameters else value.to(tensor.dtype)
    guess = LayerFacts(0, 0, experts.num_experts, 0, spec, RouterFacts("logits"))
    seam = Seam(guess, decoder, block, experts)
    experts.moestro_fn = None
    module.set_experts_implementation("moestro")
    wire, calls = Wire(seam), list[tuple[Any, Any, Any]]()
    x_TD = torch.randn(16, spec.d_model, generator=generator)
    answer_TD = torch.randn(16, spec.d_model, generator=generator)

    def answer(hidden: Any, index: Any, weights: Any) -> Any:
        calls.append((hidden, index, weights))
        return answer_TD

    try:
        with answering(seam, answer), wire.tapped((), RouteContext()):
            out = block(x_TD[None])
        out_TD = (out[0] if isinstance(out, tuple) else out).reshape(x_TD.shape)
        shared_TD = without_experts(seam, x_TD)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise UnsupportedModel(f"{type(block).__name__} cannot be run by itself: {error}") from error
    hidden, index_TK, weights_TK = calls[-1] if calls else (torch.zeros(0),) * 3
    same = len(calls) == 1 and hidden.shape == x_TD.shape and torch.allclose(hidden, x_TD)
    if not same or not torch.allclose(out_TD - shared_TD, answer_TD, atol=1e-4) or index_TK.shape != weights_TK.shape:
        raise UnsupportedModel(
            f"{type(block).__name__} does not call its experts once on its own input and add their answer",
            expected="a block that is its routed experts plus its shared ones",
            fix="use another model",
        )
    return int(index_TK.shape[1]), _router(seam, wire, index_TK, weights_TK), _shared_width(decoder)


def _router(seam: Any, wire: Any, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> RouterFacts:
    """The score whose chosen values, perhaps made to sum to 1 and scaled, are the weights."""
    tensors = [n for n, _ in (*seam.block.named_buffers(), *seam.block.named_parameters())]
    bias = any(n.endswith(("correction_bias", "expert_bias")) for n in tensors)
    if wire.logits_TE is None:
        return RouterFacts("logits", "unknown", selection_bias=bias)
    for score, probs in (("softmax", wire.logits_TE.softmax(-1)), ("sigmoid", wire.logits_TE.sigmoid())):
        taken = probs.gather(1, index_TK)
        for renormalised in (False, True):
            ratio = weights_TK / (taken / taken.sum(-1, keepdim=True) if renormalised else taken)
            if (ratio.max() - ratio.min()) < 1e-4 * ratio.max():
                scale = round(float(ratio.mean()), 4)
                return RouterFacts(score, renormalised=renormalised, scale=scale, selection_bias=bias)
    return RouterFacts("logits", "unknown", selection_bias=bias)


def _shared_width(decoder: Any) -> int:
    """Input width of the last projection of the experts that see every token; 0 without such experts."""
    for name, part in decoder.named_modules():
        if "shared" in name and re.search(r"(down_proj|w2|output_linear|fc2)$", name) and hasattr(part, "weight"):
            return int(part.weight.shape[1])
    return 0


def _cache(cls: Any, config: Any) -> tuple[int, int]:
    """Numbers cached per token and per sequence: the growth of the class's own cache, run without memory or arithmetic."""
    import copy

    import torch

    with torch.device("meta"):
        module = cls._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    module.set_experts_implementation("moestro")
    for part in module.modules():
        if hasattr(part, "_is_expert_parallel"):
            part.moestro_fn = lambda hidden, index, weights: torch.zeros_like(hidden)
    sizes = []
    for length in (4, 6):
        try:
            cache = module(torch.zeros((1, length), dtype=torch.int64, device="meta"), use_cache=True).past_key_values
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModel(f"the cache of {cls.__name__} cannot be measured: {error}") from error
        sizes.append(sum(_numel(held) for layer in cache.layers for held in vars(layer).values()))
    per_token = (sizes[1] - sizes[0]) // 2
    return per_token, sizes[0] - 4 * per_token


def _numel(held: Any) -> int:
    import torch

    if isinstance(held, torch.Tensor):
        return held.numel() if held.is_floating_point() else 0
    if isinstance(held, dict):
        held = list(held.values())
    return sum(_numel(one) for one in held) if isinstance(held, list | tuple) else 0


def _try_expert(checkpoint: Checkpoint, made: Layout, experts: Any, spec: ExpertSpec) -> None:
    """One expert from the checkpoint, put into the class's parameters as transformers would, must agree with our reading."""
    import torch

    from moestro.models.experts import feed_forward, read_expert

    key = ExpertKey(0, made.facts.layers[0].num_experts - 1)
    parts = {part.role: _as_stored(checkpoint, part) for part in made.parts(key)}
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        for suffix in ("", "_bias"):
            role = name.removesuffix("_proj") + suffix
            if getattr(experts, name + suffix, None) is None:
                continue
            value = parts[role] if role in parts else torch.cat([parts["gate" + suffix], parts["up" + suffix]])
            experts._parameters[name + suffix] = torch.nn.Parameter(value[None])
    ours = read_expert(checkpoint, made, key)
    weights = type(ours)(
        *(None if a is None else torch.from_numpy(a) for a in (getattr(ours, f) for f in ours.__dataclass_fields__))
    )
    x_TD = torch.randn(8, spec.d_model, generator=torch.Generator().manual_seed(1))
    experts.num_experts = 1
    own = type(experts).forward.__wrapped__
    theirs = own(experts, x_TD, torch.zeros((8, 1), dtype=torch.int64), torch.ones(8, 1))
    if not torch.allclose(theirs, feed_forward(x_TD, weights, spec), atol=1e-4, rtol=1e-4):
        raise UnsupportedModel(
            f"an expert of {type(experts).__name__} computes something else than {spec}",
            expected="down(act(gate(x)) * up(x))",
            fix="use another model",
        )


def _as_stored(checkpoint: Checkpoint, part: Part) -> torch.Tensor:
    """A part's values in float32, in the shape and order that the file has."""
    import numpy as np
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if part.dtype not in dtypes:
        raise UnsupportedModel(
            f"an expert has dtype {part.dtype}", expected="F32, F16 or BF16", fix="use the unquantised checkpoint"
        )
    raw = np.empty(part.nbytes, np.uint8)
    checkpoint.read_range(part.file, part.offset, raw)
    return torch.from_numpy(raw).view(dtypes[part.dtype]).reshape(part.shape).float()
