"""Upcycling by copy preserves the function, for every shape that Mixtral can express, and refuses the rest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moestro.build import mixtral
from moestro.build.executor import build
from moestro.build.upcycle.copy import copy
from moestro.core.errors import CheckpointError, InputError, PlanError, StorageError, UnsupportedModel
from moestro.core.plan import read_plan
from moestro.core.plans.construction import ConstructionPlan
from moestro.models.checkpoint import Checkpoint

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]])
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "grouped queries": ("llama", {"num_key_value_heads": 1}, {"experts": 4, "top_k": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"experts": 3, "top_k": 3}),
    "wide heads": ("llama", {"head_dim": 24}, {"experts": 16, "top_k": 5}),
    "another norm and rope": ("llama", {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 31.0}}, {}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8}}, {"experts": 1, "top_k": 1}),
    "gelu": ("llama", {"hidden_act": "gelu"}, {"experts": 2, "std": 3.0}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "mistral's window": ("mistral", {"sliding_window": 3}, {}),
}  # fmt: skip


def dense(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings | changes)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(TOKENS).logits


def upcycled(source: Path, out: Path, **options: Any) -> Path:
    checkpoint = Checkpoint.open(source)
    return build(copy(checkpoint, **options), [checkpoint], out).path


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_what_the_dense_model_computes(case: str, tmp_path: Path) -> None:
    family, changes, options = CASES[case]
    source = dense(tmp_path / "dense", family, **changes)
    expected, found = logits(source), logits(upcycled(source, tmp_path / "moe", **options))
    assert expected.abs().max() > 0.1, "a model whose logits are all alike could not fail"
    assert (expected - found).abs().max() < 1e-4


def test_the_window_case_tells_a_window_from_none(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", "mistral", sliding_window=3)
    config = json.loads((source / "config.json").read_text())
    before = logits(source)
    (source / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert (before - logits(source)).abs().max() > 1e-3


def test_the_seed_changes_the_routing_and_not_the_output_and_std_changes_neither(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = dense(tmp_path / "dense")
    seen, outputs = [], []
    for name, options in {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 0, "std": 0.2}}.items():
        model = AutoModelForCausalLM.from_pretrained(upcycled(source, tmp_path / name, **options), dtype=torch.float32)
        chosen: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, out, chosen=chosen: chosen.append(out[2].sort().values))
        with torch.no_grad():
            outputs.append(model(TOKENS).logits)
        seen.append(torch.cat(chosen))
    assert (seen[0] != seen[1]).any() and torch.equal(seen[0], seen[2])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 and (outputs[0] - outputs[2]).abs().max() < 1e-4


def test_layers_have_routers_of_their_own(tmp_path: Path) -> None:
    moe = Checkpoint.open(upcycled(dense(tmp_path / "dense"), tmp_path / "moe", std=0.5))
    first, second = (moe.read(mixtral.router_name(i)) for i in (0, 1))
    assert np.abs(first - second).max() > 0.1 and first.std() == pytest.approx(0.5, rel=0.15)


def test_bfloat16_bytes_are_copied_as_they_are_and_old_buffers_reported(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", dtype=torch.bfloat16)
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = {buffer: np.ones(6, np.float32)}
    save_file(tensors, source / "more.safetensors")
    names = list(Checkpoint.open(source).tensors)
    (source / "model.safetensors").rename(source / "first.safetensors")
    index = {"weight_map": {**dict.fromkeys(names, "first.safetensors"), buffer: "more.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(source)
    plan = copy(checkpoint)
    built = build(plan, [checkpoint], tmp_path / "moe")
    moe = Checkpoint.open(built.path)
    assert built.dropped == plan.dropped == (buffer,) and buffer in plan.summary()
    assert {ref.dtype for ref in moe.tensors.values()} == {"BF16"} and moe.config["dtype"] == "bfloat16"
    for i in range(2):
        for matrix in mixtral.MATRICES:
            original = checkpoint.read(mixtral.dense_name(i, matrix))
            assert all((moe.read(mixtral.expert_name(i, e, matrix)) == original).all() for e in range(8))
    trunk = [name for name in checkpoint.tensors if ".mlp." not in name and name != buffer]
    assert all((moe.read(name) == checkpoint.read(name)).all() for name in trunk)
    assert built.bytes_read == checkpoint.nbytes - 24, "each source tensor is read once"
    assert built.bytes_written == moe.nbytes and built.tensors == len(moe.tensors)


def test_an_expert_is_one_contiguous_range(tmp_path: Path) -> None:
    moe = Checkpoint.open(upcycled(dense(tmp_path / "dense"), tmp_path / "moe"))
    for e in range(8):
        refs = [moe.tensors[mixtral.expert_name(1, e, matrix)] for matrix in mixtral.MATRICES]
        assert all(b.offset == a.offset + a.nbytes for a, b in itertools.pairwise(refs))


def test_what_config_json_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, MistralConfig, MixtralConfig

    for cls, name in ((LlamaConfig, "LlamaForCausalLM"), (MistralConfig, "MistralForCausalLM")):
        made = MixtralConfig(**mixtral.moe_config({"architectures": [name]}, experts=8, top_k=2))
        assumed = cls()
        for key in mixtral.DEFAULTS[name]:
            expected = getattr(assumed, key, None)
            if key == "head_dim":
                expected = assumed.hidden_size // assumed.num_attention_heads
            assert getattr(made, key) == expected, (name, key)
        assert made.rope_parameters == assumed.rope_parameters


def test_the_old_spelling_of_rope_carries_over() -> None:
    old = {"architectures": ["LlamaForCausalLM"], "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    made = mixtral.moe_config(old, experts=2, top_k=1)
    assert made["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0} and made["rope_theta"] == 7.0


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["GraniteForCausalLM"]},
        {"architectures": None},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_what_would_compute_something_else_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModel, match="would not compute the same"):
        copy(Checkpoint.open(source))


def test_tensors_out_of_place_are_refused(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense", "qwen3", head_dim=12)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedModel, match="k_norm"):
        copy(Checkpoint.open(source))
    source = dense(tmp_path / "short")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks 9 tensors"):
        copy(Checkpoint.open(source))
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="has shape"):
        copy(Checkpoint.open(source))


@pytest.mark.parametrize(
    "options", [{"top_k": 9}, {"experts": 0}, {"top_k": 0}, {"std": 0.0}, {"std": float("nan")}, {"seed": -1}]
)
def test_options_that_make_no_mixture(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        copy(Checkpoint.open(dense(tmp_path / "dense")), **options)


def test_the_plan_is_json_without_tensors_and_belongs_to_its_model(tmp_path: Path) -> None:
    source = Checkpoint.open(dense(tmp_path / "dense"))
    plan = copy(source, experts=4, seed=7)
    plan.save(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert "4 experts" in plan.summary() and "8 experts out of 2" in plan.summary()
    other = Checkpoint.open(dense(tmp_path / "other", hidden_size=64))
    with pytest.raises(PlanError, match="at hand"):
        build(plan, [other], tmp_path / "moe")
    data = plan.to_json()
    data["layers"] = [dict(data["layers"][0], experts=[{"subject": 0, "layer": 9}] * 4), data["layers"][1]]
    with pytest.raises(PlanError, match="layer 9"):
        build(ConstructionPlan.from_json(json.loads(json.dumps(data))), [source], tmp_path / "moe")
    data["layers"] = data["layers"][1:]
    with pytest.raises(PlanError, match="every decoder layer"):
        build(ConstructionPlan.from_json(json.loads(json.dumps(data))), [source], tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").write_text("mine")
    with pytest.raises(StorageError):
        upcycled(source, tmp_path / "moe")
    assert [p.name for p in (tmp_path / "moe").iterdir()] == ["mine.txt"]


def test_progress_ends_at_one(tmp_path: Path) -> None:
    checkpoint, seen = Checkpoint.open(dense(tmp_path / "dense")), []
    build(copy(checkpoint), [checkpoint], tmp_path / "moe", progress=lambda what, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0
