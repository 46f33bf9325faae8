"""Export to Hugging Face families: transformers computes the same logits, the engine runs the result, what cannot be is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.engine.engine import Engine
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.taps.loss_free import LossFree
from moestro.models.open import open_model
from moestro.models.trained_export import FAMILIES, export

BASE = MoEConfig(
    vocabulary=48, d_model=32, layers=3, heads=4, kv_heads=2, context=64, num_experts=8, top_k=2, d_expert=16, init_std=0.2
)
MLA = {"kv_heads": 0, "d_head": 8, "mixer": {"name": "mla", "kv_rank": 12, "d_nope": 6, "d_value": 10}}
RAW = {"name": "topk", "combine": "raw"}
V3 = {"name": "deepseek_v3", "groups": 4, "kept": 2}
CASES = {
    "mixtral": {},
    "mixtral, tied, softmax of the chosen": {"tied": True, "router": {"name": "topk", "combine": "softmax"}},
    "olmoe": {"qk_norm": "full", "router": RAW},
    "olmoe, renormalised": {"qk_norm": "full"},
    "qwen3_moe": {"qk_norm": "head", "dense_layers": (1,), "d_head": 16},
    "qwen2_moe": {"d_shared": 24, "shared_gate": True, "dense_layers": (0,), "router": RAW},
    "qwen2_moe, shared without a gate": {"d_shared": 24},
    "qwen2_moe, Switch without capacity": {"router": {"name": "switch", "evaluate_capacity": 0}, "top_k": 1},
    "qwen2_moe, noisy top-k": {"router": "noisy_topk", "d_shared": 16},
    "glm4_moe": {"router": V3, "d_shared": 32, "dense_layers": (0,), "qk_norm": "head"},
    "glm4_moe, no shared": {"router": "deepseek_v3"},
    "deepseek_v3": MLA | {"router": V3, "d_shared": 16, "dense_layers": (0,)},
    "deepseek_v3, q_rank": MLA | {"router": "deepseek_v3", "mixer": {"name": "mla", "kv_rank": 12, "q_rank": 20}},
    "deepseek_v2": MLA | {"router": {"name": "topk", "combine": "raw", "scale": 1.5}, "d_shared": 32, "dense_layers": (0,)},
}


def model(changes):
    made = build(dataclasses.replace(BASE, **changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        for part in made.modules():
            if isinstance(part, LossFree):
                part.bias_E.normal_(std=0.3)
    return made


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_logits(case, tmp_path):
    module = model(CASES[case])
    family = case.split(",")[0]
    written = export(module, tmp_path / "m", family if "Switch" in case or "noisy" in case else "auto")
    opened = open_model(written)
    assert opened.facts.family == family == written.config["model_type"]
    tokens = torch.randint(0, 48, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(opened.module(input_ids=tokens).logits, module(tokens).logits_BTV, rtol=1e-4, atol=1e-4)


def test_every_family_has_a_case():
    assert {case.split(",")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", ["mixtral", "glm4_moe", "deepseek_v3"])
def test_the_engine_runs_it(case, tmp_path):
    """The torch-free runtime computes what was trained."""
    module = model(CASES[case])
    export(module, tmp_path / "m", verify=False)
    tokens = [5, 7, 11, 13, 17]
    with Engine.open(tmp_path / "m", context=64) as engine, torch.no_grad():
        found = next(engine.run([tokens])).logits_TV
        np.testing.assert_allclose(found, module(torch.tensor([tokens])).logits_BTV[0].numpy(), rtol=1e-3, atol=1e-3)


def test_sixteen_bits(tmp_path):
    module = model({}).bfloat16().float()
    written = export(module, tmp_path / "m", dtype="bfloat16")
    assert {ref.dtype for ref in written.tensors.values()} == {"BF16"}
    opened = open_model(written, "float32").module
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=tokens).logits, module(tokens).logits_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "family", "words"),
    [
        ({}, "llama", "no export to 'llama'"),
        ({"d_shared": 16}, "mixtral", "no shared expert"),
        ({"router": V3}, "qwen2_moe", "no sigmoid scores"),
        ({"router": "switch"}, "auto", "a capacity"),
        ({"router": {"name": "topk", "combine": "sigmoid"}}, "auto", "convention 'sigmoid x 1'"),
        ({"router": {"name": "topk", "bias": True}}, "auto", "scores with Linear"),
        ({"special": ({"name": "zero", "count": 2},)}, "auto", "no special ones"),
        ({"experts": "ternary"}, "auto", "experts 'ternary'"),
        ({"block": {"name": "product_key", "n": 4, "k": 2}}, "auto", "block 'product_key'"),
        ({"dense_layers": (0, 1, 2)}, "auto", "without an MoE layer"),
    ],
)
def test_what_no_family_can_express_is_refused(changes, family, words, tmp_path):
    with pytest.raises(UnsupportedModel, match=words):
        export(model(changes), tmp_path / "m", family)
    assert not (tmp_path / "m").exists()


def test_a_wrong_export_is_noticed(tmp_path, monkeypatch):
    from moestro.models import trained_export

    monkeypatch.setattr(trained_export, "_neighbours", lambda weight, first: weight)
    with pytest.raises(CheckpointError, match="other logits"):
        export(model(CASES["deepseek_v3"]), tmp_path / "m")
    assert not (tmp_path / "m").exists()
