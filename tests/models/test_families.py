"""Facts of every family, each checked against the numbers of a live transformers module."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.core.experts import ExpertKey
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.families import describe, family_of, known
from moestro.models.families.settings import Settings
from moestro.testing.tiny import FAMILIES, layouts, save_tiny, tiny_config

EVERY = [(family, layout) for family in FAMILIES for layout in layouts(family)]


SIZES = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "moe_intermediate_size", "layer_types",
    "num_experts_per_tok", "n_routed_experts", "n_group", "topk_group",
}  # fmt: skip


def write_config(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's config.json; a value of None removes the key."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")


def write_tensors(folder: Path, change: Any) -> None:
    """Rewrite a one-file checkpoint with `change(tensors)`."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def experts_of(module: Any) -> dict[int, Any]:
    named = {name: m for name, m in module.named_modules() if name.endswith(".experts")}
    return {int(name.split("layers.")[1].split(".")[0]): m for name, m in named.items()}


def live_expert(experts: Any, e: int, llama4: bool) -> dict[str, np.ndarray]:
    """One expert by the conventions of the transformers module, written down here a second time."""
    gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
    if llama4 or experts.is_transposed:
        gate_up, down = gate_up.t(), down.t()
    half = gate_up.shape[0] // 2
    inter = not llama4 and not experts.is_concatenated
    gate, up = (gate_up[0::2], gate_up[1::2]) if inter else (gate_up[:half], gate_up[half:])
    out = {"gate_FD": gate, "up_FD": up, "down_DF": down}
    if not llama4 and experts.has_bias:
        bias = experts.gate_up_proj_bias[e]
        out |= {"gate_F": bias[0::2] if inter else bias[:half], "up_F": bias[1::2] if inter else bias[half:]}
        out["down_D"] = experts.down_proj_bias[e]
    return {name: t.detach().numpy() for name, t in out.items()}


def chosen_per_token(module: Any, indexes: list[int]) -> int:
    """top_k as the live module uses it: the width of what its experts are called with."""
    experts, seen = experts_of(module)[indexes[0]], []
    handle = experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    module(torch.randint(4, 128, (1, 5)))
    handle.remove()
    if len(seen[0]) == 1:  # every expert is run on every token: count the tokens that were not scaled to zero
        rows = seen[0][0].reshape(experts.num_experts, -1, seen[0][0].shape[-1])
        return int((rows.abs().sum(-1) > 0).sum(0).unique().item())
    return int(seen[0][1].shape[-1])


@pytest.mark.parametrize(("family", "layout"), EVERY)
@torch.no_grad()
def test_facts_are_those_of_the_live_module(family, layout, tmp_path):
    module = save_tiny(family, tmp_path, layout)
    found = describe(Checkpoint.open(tmp_path))
    facts, experts = found.facts, experts_of(module)
    assert [layer.index for layer in facts.layers] == sorted(experts)
    assert [layer.ordinal for layer in facts.layers] == list(range(len(experts)))
    top_k = chosen_per_token(module, sorted(experts))
    llama4 = not hasattr(next(iter(experts.values())), "is_transposed")
    for layer in facts.layers:
        live = experts[layer.index]
        assert (layer.num_experts, layer.top_k) == (live.num_experts, top_k)
        assert layer.spec.weigh_input == llama4
        numel = sum(p[0].numel() for p in live.parameters())
        assert layer.spec.parameters == numel
        if layout != "mxfp4":
            assert layer.expert_bytes == 4 * numel
        for e in range(layer.num_experts):
            ours, theirs = (
                read_expert(Checkpoint.open(tmp_path), found, ExpertKey(layer.ordinal, e)),
                live_expert(live, e, llama4),
            )
            for name in ("gate_FD", "up_FD", "down_DF", "gate_F", "up_F", "down_D"):
                if name in theirs:
                    np.testing.assert_array_equal(getattr(ours, name), theirs[name], err_msg=f"{name} of expert {e}")
                else:
                    assert getattr(ours, name) is None
    inside = tuple(f"{name}." for name, m in module.named_modules() if name.endswith(".experts"))
    state = {name: t for name, t in module.state_dict().items() if not name.startswith(inside)}
    if module.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert sum(t.nbytes for t in state.values()) == facts.trunk_bytes and len(state) == len(found.trunk)
    assert facts.expert_bytes == sum(layer.expert_bytes * layer.num_experts for layer in facts.layers)
    on_disk = sum(ref.nbytes for ref in Checkpoint.open(tmp_path).tensors.values())
    assert facts.trunk_bytes + facts.expert_bytes == on_disk and not found.ignored
    assert (facts.vocabulary, facts.context) == (128, 256)
    assert facts.tied_embeddings == module.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shared_width(family, tmp_path):
    module = save_tiny(family, tmp_path)
    facts = describe(Checkpoint.open(tmp_path)).facts
    for layer in facts.layers:
        decoder = f"layers.{layer.index}."
        linears = [
            (n, m)
            for n, m in module.named_modules()
            if decoder in n and "shared" in n and n.endswith(("down_proj", "output_linear"))
        ]
        assert layer.shared == (linears[0][1].in_features if linears else 0)


def cached(module: Any, length: int) -> int:
    cache = module(torch.randint(4, 128, (1, length)), use_cache=True).past_key_values
    total = 0
    for layer in cache.layers:
        for held in vars(layer).values():
            for tensor in held if isinstance(held, list | tuple) else held.values() if isinstance(held, dict) else (held,):
                total += tensor.numel() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else 0
    return total


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cache_sizes_are_those_of_the_live_cache(family, tmp_path):
    module = save_tiny(family, tmp_path)
    facts = describe(Checkpoint.open(tmp_path)).facts
    short, longer = cached(module, 5), cached(module, 7)
    assert longer - short == 2 * facts.kv_values_per_token
    assert short - 5 * facts.kv_values_per_token == facts.extra.get("state_values", 0)
    if window := facts.extra.get("window"):
        assert cached(module, window + 9) - cached(module, window + 5) == 4 * (
            facts.kv_values_per_token - facts.extra["windowed_values"]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_the_transformers_class(family):
    whole = tiny_config(family).to_dict()
    cls, module = type(tiny_config(family)), family_of(whole["model_type"])
    assert module is not None
    compared = 0
    for key in sorted(set(whole) - {"model_type"}):
        partial = {k: v for k, v in whole.items() if k != key}
        try:
            full = cls.from_dict(partial).to_dict()
        except Exception as error:  # transformers' own default does not go with the rest
            assert "Validation" in type(error).__name__, error
            continue
        try:
            ours = module.block(Settings(partial, "partial"))
        except CheckpointError as error:
            assert key in SIZES and f"lacks {key}" in str(error), key  # a size is never guessed
            continue
        assert ours == module.block(Settings(full, "full")), f"{key} left out"
        compared += 1
    assert compared > 20


def test_families_and_engine_facts_need_no_torch():
    code = "import sys, moestro.models.families as f; f.known(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_known_type_has_a_tiny_model():
    assert {tiny_config(family).model_type for family in FAMILIES} == set(known())


def test_layers_beyond_the_last_are_listed_as_ignored(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    write_tensors(
        tmp_path, lambda t: t.update({n.replace("layers.2.", "layers.3."): a for n, a in list(t.items()) if "layers.2." in n})
    )
    found = describe(Checkpoint.open(tmp_path))
    assert found.ignored and all(".layers.3." in name for name in found.ignored)
    assert len(found.facts.layers) == 2


def test_llama4_inside_a_multimodal_checkpoint(tmp_path):
    save_tiny("llama4_text", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    whole = {"model_type": "llama4", "text_config": config, "vision_config": {}, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(whole), "utf-8")

    def wrap(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_model.patch_embedding.linear.weight"] = np.ones((4, 4), np.float32)
        tensors["multi_modal_projector.linear_1.weight"] = np.ones((4, 4), np.float32)

    write_tensors(tmp_path, wrap)
    found = describe(Checkpoint.open(tmp_path))
    assert found.facts.family == "llama4_text" and len(found.facts.layers) == 2
    assert found.ignored == ("multi_modal_projector.linear_1.weight", "vision_model.patch_embedding.linear.weight")


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"), CheckpointError, "expert 2 of layer 1: no up"),
        (lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w3.weight": np.ones((3, 32), np.float32)}), CheckpointError, "has shape"),
        (lambda t: t.update({"model.layers.1.block_sparse_moe.experts.9.w3.weight": np.ones((24, 32), np.float32)}), CheckpointError, "expert 9"),
        (lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w3.weight": np.ones((24, 32), np.int32)}), UnsupportedModel, "dtype I32"),
        (lambda t: t.update({"model.layers.1.block_sparse_moe.experts.2.w3.scale": np.ones(1, np.float32)}), UnsupportedModel, "w3.scale"),
        (lambda t: t.pop("lm_head.weight"), CheckpointError, "lm_head"),
        (lambda t: [t.pop(n) for n in list(t) if "layers.2.block_sparse_moe.experts" in n], CheckpointError, "layer 2"),
    ],
)  # fmt: skip
def test_experts_that_are_not_whole_are_refused(damage, error, says, tmp_path):
    save_tiny("mixtral", tmp_path)
    write_tensors(tmp_path, damage)
    with pytest.raises(error, match=says):
        describe(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"num_experts_per_tok": 5}, CheckpointError, "4 experts of which 5"),
        ({"num_local_experts": 5}, CheckpointError, "expert 4 of layer 0"),
        ({"num_local_experts": "four"}, CheckpointError, "whole number"),
        ({"intermediate_size": 25}, CheckpointError, "has shape"),
        ({"hidden_act": "mish"}, UnsupportedModel, "mish"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedModel, "fp8"),
        ({"model_type": None}, UnsupportedModel, "model_type"),
        ({"hidden_size": None}, CheckpointError, "lacks hidden_size"),
        ({"model_type": "nobody_knows", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, UnsupportedModel, "remote code"),
        ({"model_type": "nobody_knows"}, UnsupportedModel, "does not know"),
        ({"model_type": "llama"}, UnsupportedModel, "can be replaced"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, error, says, tmp_path):
    save_tiny("mixtral", tmp_path)
    write_config(tmp_path, **changes)
    with pytest.raises(error, match=says):
        describe(Checkpoint.open(tmp_path))
