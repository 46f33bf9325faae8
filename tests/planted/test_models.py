"""The planted truth is what the live model does: routing as transformers has it, greedy decoding, margins far from ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.testing.planted import Planted, domain_model, sticky_model


def watched(planted: Planted, tokens: list[int]) -> tuple[np.ndarray, np.ndarray, Any]:
    """experts_LTK at the seam, logits_TV, and the model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(planted.path, dtype=torch.float32)
    seen: list[np.ndarray] = []
    # The seam: what the experts are called with is (hidden, top_k_index, top_k_weights).
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].numpy().copy()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(seen), logits, model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [sticky_model, domain_model])
def test_the_model_routes_and_continues_as_planted(make: Any, dtype: str, tmp_path: Path) -> None:
    planted = make(tmp_path / "model", dtype=dtype)
    for tokens in planted.sequences[:2]:
        experts_LTK, logits_TV, model = watched(planted, tokens)
        assert (experts_LTK == planted.truth.experts(tokens)).all()
        assert (logits_TV.argmax(-1) == planted.truth.next_V[tokens]).all()
        best = np.sort(logits_TV, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1.0, "the planted token wins clearly"
        with torch.no_grad():
            out = model.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)[0, len(tokens) :].tolist()
        assert out == planted.truth.continuation(tokens[-1], 40)


def test_a_wrong_expert_shows_in_the_logits(tmp_path: Path) -> None:
    planted = sticky_model(tmp_path / "model")
    tokens = planted.sequences[0]
    _, before, model = watched(planted, tokens)
    used = planted.truth.experts(tokens)[0, 0, 0]
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[used] *= 1.01
        after = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(after - before).max() > 1e-3


def test_domains_of_the_sticky_model_are_disjoint_and_repeat_as_planted(tmp_path: Path) -> None:
    planted = sticky_model(tmp_path / "model", repeat=0.8, sequences=8, length=500)
    truth = planted.truth
    for layer in range(3):
        sets = [truth.domain_experts(group, layer) for group in range(4)]
        assert all(len(s) == 2 for s in sets) and len(set.union(*sets)) == 8
    groups = [truth.group_V[s] for s in planted.sequences]
    kept = np.concatenate([g[1:] == g[:-1] for g in groups]).mean()
    assert kept == pytest.approx(0.8, abs=0.03)
    trace = truth.trace([3, 4, 5], 200)
    assert trace.tokens == 202 and [s.prefill for s in trace.steps()] == [True] + [False] * 199
    assert (trace.experts_LTK[:, 3] == truth.experts(truth.continuation(5, 1))[:, 0]).all()


def test_domains_of_the_domain_model_use_their_experts_and_leave_others_idle(tmp_path: Path) -> None:
    truth = domain_model(tmp_path / "model").truth
    for layer in range(2):
        sets = [truth.domain_experts(group, layer) for group in range(3)]
        assert all(len(s) == 4 for s in sets)
        assert len(set.union(*sets)) == 12 and truth.num_experts == 14, "two are never used"


def test_the_words_of_a_planted_model_are_its_tokens(tmp_path: Path) -> None:
    from moestro.models.tokenizer import Tokenizer

    planted = sticky_model(tmp_path / "model")
    tokenizer = Tokenizer.open(planted.path)
    assert list(tokenizer.encode("a0 b3 d15")) == [0, 16 + 3, 3 * 16 + 15]


def test_a_planted_model_can_be_made_again_in_place(tmp_path: Path) -> None:
    first = sticky_model(tmp_path / "model", seed=1)
    again = sticky_model(tmp_path / "model", seed=1)
    assert first.sequences == again.sequences and (first.truth.experts_VLK == again.truth.experts_VLK).all()
    assert (sticky_model(tmp_path / "other", seed=2).truth.experts_VLK != first.truth.experts_VLK).any()
