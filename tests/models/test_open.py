"""Live models: replaceable routers and experts, taps, watchers, and checkpoints that do not fit their class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moestro.core.errors import CheckpointError, InputError, UnsupportedModel
from moestro.core.experts import ExpertWeights
from moestro.core.layer import MoELayer, Runner
from moestro.core.routing import EMPTY, Routing, Tap
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.live import build_trunk
from moestro.models.open import Model, open_model
from moestro.testing.tiny import FAMILIES, randomise, save_tiny, tiny_config, write

TOKENS = [[5, 60, 7, 88, 9, 101, 33]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    def make(family: str = "mixtral", **changes: Any) -> Model:
        save_tiny(family, tmp_path / family, **changes)
        return open_model(tmp_path / family, "float32")

    return make


def logits(model: Model) -> torch.Tensor:
    (out,) = model.run(TOKENS)
    return out.logits_TV


def edit(folder: Path, change: Any) -> Checkpoint:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(folder)


def test_protocols(opened):
    model = opened()
    assert isinstance(model, Runner)
    assert all(isinstance(layer, MoELayer) for layer in model.layers)


def test_parameters_live_in_the_module_and_can_be_trained(opened):
    model = opened()
    assert not [n for n, p in model.module.named_parameters() if p.device.type == "meta"]
    out = model.module(input_ids=torch.tensor(TOKENS), labels=torch.tensor(TOKENS))
    out.loss.backward()
    grad = model.layers[0]._seam.experts.gate_up_proj.grad
    assert grad is not None and grad.abs().sum() > 0
    weights = model.layers[0].experts.weights(1)
    with torch.no_grad():
        before = logits(model)
        weights.down_DF.zero_()
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_change_the_forward_and_leave_the_original_alone(opened, family):
    model = opened(family)
    layer, num = model.layers[0], model.layers[0].facts.num_experts
    (out,) = model.run(TOKENS, inputs=True)
    before, x_TD = out.logits_TV, out.records[0].x_TD
    with torch.no_grad():
        plain = layer.route(x_TD)
        counts = np.bincount(plain.experts_TK.reshape(-1).numpy(), minlength=num)
        banned = int(counts.argmax())

        def ban(scores_TE: torch.Tensor, ctx: Any) -> torch.Tensor:
            scores_TE = scores_TE.clone()
            scores_TE[:, banned] = -1e4
            return scores_TE

        original = layer.router
        layer.replace(router=original.tapped(Tap("logits", ban)))
        routing = layer.route(x_TD)
        there = routing.experts_TK == banned  # a bias on the choice alone may still choose it, with no weight
        assert not there.any() or layer.facts.router.selection_bias
        assert (routing.weights_TK[there] == 0).all()
        assert not torch.allclose(logits(model), before)
        layer.replace(router=original)
        torch.testing.assert_close(logits(model), before)
        again = layer.route(x_TD)
        assert torch.equal(again.experts_TK, plain.experts_TK)

        halved = original.tapped(Tap("routing", lambda r, ctx: replace(r, weights_TK=r.weights_TK * 0.5)))
        layer.replace(router=halved)
        torch.testing.assert_close(layer.route(x_TD).weights_TK, plain.weights_TK * 0.5)
        assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_choice_tap_changes_the_choice_but_not_the_scores(opened, family):
    model = opened(family)
    layer, num = model.layers[0], model.layers[0].facts.num_experts
    x_TD = torch.randn(6, layer.facts.spec.d_model, generator=torch.Generator().manual_seed(0))
    favoured = layer.router.tapped(Tap("choice", lambda s_TE, ctx: s_TE + 1e4 * (torch.arange(num) == 2)))
    with torch.no_grad():
        if layer.facts.router.score == "sparsemixer":
            with pytest.raises(UnsupportedModel, match="top-k"):
                layer.route(x_TD) and favoured(x_TD, layer.context)
            return
        plain, routing = layer.route(x_TD), favoured(x_TD, layer.context)
        if layer.facts.router.groups == 1:
            assert (routing.experts_TK == 2).any(-1).all()
        assert torch.equal(routing.logits_TE, plain.logits_TE)
        assert not torch.equal(routing.experts_TK.sort().values, plain.experts_TK.sort().values)
        assert (routing.weights_TK <= plain.weights_TK.max() * 1.5 + 1).all(), "the tap's 10,000 leaked into the weights"


def test_experts_can_be_replaced(opened):
    model = opened()
    layer, before = model.layers[1], logits(model)

    class Silent:
        num, spec = layer.facts.num_experts, layer.facts.spec

        def weights(self, e: int) -> ExpertWeights:
            raise AssertionError

        def run(self, x_TD: Any, routing: Routing) -> Any:
            return torch.zeros_like(x_TD)

        def output(self, x_TD: Any, e: int) -> Any:
            return torch.zeros_like(x_TD)

    original = layer.experts
    layer.replace(experts=Silent())
    x_TD = torch.randn(3, 32)
    assert not layer.run(x_TD, layer.route(x_TD)).any()
    assert not torch.allclose(logits(model), before)
    layer.replace(experts=original)
    torch.testing.assert_close(logits(model), before)


@torch.no_grad()
def test_empty_slots_and_single_experts(opened):
    for family in ("qwen3_moe", "llama4_text", "gpt_oss"):
        layer = opened(family).layers[0]
        x_TD = torch.randn(4, layer.facts.spec.d_model)
        routing = layer.route(x_TD)
        none = routing.drop(torch.ones_like(routing.experts_TK, dtype=torch.bool), renormalise=False)
        assert (none.experts_TK == EMPTY).all()
        assert not layer.experts.run(x_TD, none).any()
        one = Routing(torch.full((4, 1), 2), torch.ones(4, 1))
        torch.testing.assert_close(layer.experts.run(x_TD, one), layer.experts.output(x_TD, 2))


def test_watchers_see_each_pass_until_stopped(opened):
    model, seen = opened("deepseek_v3"), []
    stop = model.layers[1].watch(lambda ordinal, x, routing, y: seen.append((ordinal, x.shape, routing, y.shape)))
    logits(model)
    stop()
    logits(model)
    ((ordinal, x_shape, routing, y_shape),) = seen
    assert ordinal == 1 and x_shape == y_shape == (7, 32)
    assert routing.logits_TE is not None and routing.probs_TE is not None


def test_routers_are_told_which_tokens_they_see(opened):
    model, seen = opened(), []

    def look(routing: Routing, ctx: Any) -> Routing:
        seen.append((ctx.layer, ctx.token_ids_T.tolist(), ctx.sequence_T.tolist(), ctx.position_T.tolist()))
        return routing

    model.layers[2].replace(router=model.layers[2].router.tapped(Tap("routing", look)))
    list(model.run([[9, 8, 7], [6, 5]]))
    assert seen == [(2, [9, 8, 7], [0] * 3, [0, 1, 2]), (2, [6, 5], [1, 1], [0, 1])]


@pytest.mark.parametrize("tokens", [[], [5, 128], [-1]])
def test_bad_tokens(opened, tokens):
    with pytest.raises(InputError):
        list(opened().run([tokens]))


def silent(ordinal: int, x: Any, index: Any, weights: Any) -> Any:
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "lacks 1 weights .*layers.1.self_attn.q_proj.weight"),
        (lambda t: t.update({"model.layers.1.self_attn.extra": np.ones(3, np.float32)}), "layers.1.self_attn.extra has no place"),
        (lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}), r"model.norm.weight has shape \[31\]"),
        (lambda t: t["model.norm.weight"].__setitem__(3, np.nan), "model.norm.weight"),
        (lambda t: t["model.layers.1.block_sparse_moe.gate.weight"].__setitem__((1, 3), np.inf), "gate.weight"),
    ],
)
def test_a_trunk_that_is_not_whole_is_refused(change, says, tmp_path):
    save_tiny("mixtral", tmp_path)
    checkpoint = edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        build_trunk(checkpoint, describe(checkpoint), "float32", silent)


def test_nan_in_an_expert_is_refused(tmp_path):
    save_tiny("mixtral", tmp_path)
    checkpoint = edit(tmp_path, lambda t: t["model.layers.1.block_sparse_moe.experts.2.w3.weight"].__setitem__((0, 0), np.nan))
    with pytest.raises(CheckpointError, match="up_FD of expert 2 in MoE layer 1"):
        open_model(checkpoint)


def test_the_trunk_alone_holds_no_expert(tmp_path):
    save_tiny("olmoe", tmp_path, intermediate_size=64)
    checkpoint = Checkpoint.open(tmp_path)
    layout = describe(checkpoint)
    trunk = build_trunk(checkpoint, layout, "auto", silent)
    held = sum(t.nbytes for t in trunk.state_dict().values() if t.device.type != "meta")
    assert held == layout.facts.trunk_bytes
    assert all(t.device.type == "meta" for n, t in trunk.state_dict().items() if ".experts." in n)


def test_tied_and_untied_output_layers(tmp_path):
    for tied in (True, False):
        reference = save_tiny("mixtral", tmp_path / str(tied), tie_word_embeddings=tied)
        model = open_model(tmp_path / str(tied), "float32")
        assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied == model.facts.tied_embeddings
        torch.testing.assert_close(logits(model), reference(torch.tensor(TOKENS)).logits[0], atol=1e-4, rtol=0)
    # says tied, has both, and they differ: transformers keeps them apart
    edit(tmp_path / "True", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))
    model = open_model(tmp_path / "True", "float32")
    torch.testing.assert_close(model.module.lm_head.weight, 2 * model.module.model.embed_tokens.weight)


def test_llama4_in_a_multimodal_checkpoint_runs(tmp_path):
    reference = save_tiny("llama4_text", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama4", "text_config": config, "vision_config": {}}), "utf-8"
    )

    def wrap(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision_model.patch_embedding.linear.weight"] = np.ones((4, 4), np.float32)

    edit(tmp_path, wrap)
    torch.testing.assert_close(
        logits(open_model(tmp_path, "float32")), reference(torch.tensor(TOKENS)).logits[0], atol=1e-4, rtol=0
    )


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    from transformers import AutoModelForCausalLM, Mxfp4Config

    save_tiny("gpt_oss", tmp_path, "mxfp4", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=Mxfp4Config(dequantize=True))
    ours = open_model(tmp_path)
    for layer, decoder in zip(ours.layers, theirs.model.layers):
        for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            a, b = getattr(layer._seam.experts, name), getattr(decoder.mlp.experts, name)
            assert torch.equal(a, b), name


# Classes without a family file. Sizes that their configuration classes call by other names are given here.
PLAIN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
UNWRITTEN = {
    "afmoe": PLAIN | {"num_local_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1},
    "exaone_moe": PLAIN | {"num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "solar_open": PLAIN | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "qwen3_next": PLAIN | LINEAR | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    "mellum": PLAIN,
    "nemotron_h": PLAIN  # experts without a gate
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "layers_block_type": ["mamba", "moe", "attention"],
    }
    | {"moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2},
}


def save_unwritten(model_type: str, folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {k: v for k, v in tiny_config("mixtral").to_dict().items() if k in COMMON}
    config = AutoConfig.for_model(model_type, **(common | UNWRITTEN[model_type]))
    module = randomise(AutoModelForCausalLM.from_config(config))
    write(module, folder)
    return module


COMMON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip


@pytest.mark.parametrize("model_type", UNWRITTEN)
@torch.no_grad()
def test_a_class_without_a_file_works_from_its_structure(model_type, tmp_path):
    reference = save_unwritten(model_type, tmp_path)
    model = open_model(tmp_path, "float32")
    assert model.facts.family == model_type and model.facts.extra["described"]
    wanted = reference(torch.tensor(TOKENS)).logits[0]
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    for layer in model.layers:
        x_TD = torch.randn(5, layer.facts.spec.d_model)
        decoder = reference.model.layers[layer.facts.index]
        out = (decoder.mlp if hasattr(decoder, "mlp") else decoder.mixer)(x_TD[None])
        torch.testing.assert_close(layer.run(x_TD, layer.route(x_TD)), out.reshape(5, -1), atol=1e-5, rtol=0)


def test_a_class_whose_gate_is_unknown_is_refused(tmp_path, monkeypatch):
    save_unwritten("mellum", tmp_path)
    experts = type(open_model(tmp_path).layers[0]._seam.experts)
    monkeypatch.setattr(experts, "_apply_gate", lambda self, x: x.chunk(2, -1)[0] * torch.cos(x.chunk(2, -1)[1]))
    with pytest.raises(UnsupportedModel, match="gate of MellumExperts"):
        describe(Checkpoint.open(tmp_path))


def test_a_class_whose_experts_do_something_more_is_refused(tmp_path, monkeypatch):
    save_unwritten("mellum", tmp_path)
    experts = type(open_model(tmp_path).layers[0]._seam.experts)
    own = experts.forward.__wrapped__
    monkeypatch.setattr(experts.forward, "__wrapped__", lambda self, *args: own(self, *args) * 1.01)
    with pytest.raises(UnsupportedModel, match="computes something else"):
        describe(Checkpoint.open(tmp_path))


def test_a_block_that_is_more_than_its_experts_is_refused(tmp_path, monkeypatch):
    save_unwritten("mellum", tmp_path)
    block = type(open_model(tmp_path).layers[0]._seam.block)
    own = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x: own(self, x) * 1.01)
    with pytest.raises(UnsupportedModel, match="add their answer"):
        describe(Checkpoint.open(tmp_path))
