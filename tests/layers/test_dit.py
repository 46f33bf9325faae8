"""DiT-MoE: a fresh model is the identity; time and class reach it; the objective's error and walk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.block import Output
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.train.data.stream import Batch
from moestro.train.objectives.rectified_flow import RectifiedFlow, draw

CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=2, heads=2, num_experts=4, top_k=2, d_expert=8, d_shared=8, init_std=0.3,
    architecture={"name": "dit", "levels": [14, 31]}, router={"name": "topk", "combine": "raw"},
)  # fmt: skip
TOKENS = torch.randint(14, 31, (2, 8), generator=torch.Generator().manual_seed(0))


def spread(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def test_levels_are_numbers_from_minus_one_to_one():
    model = build(CONFIG)
    assert model.state_of(torch.tensor([[14, 22, 30]])).flatten().tolist() == [-1.0, 0.0, 1.0]
    ids = build(replace(CONFIG, architecture="dit"))
    assert torch.equal(ids.state_of(torch.tensor([[3]])), torch.eye(32)[3][None, None])


def test_a_fresh_block_is_the_identity_and_a_fresh_model_gives_zero():
    model, seen = build(CONFIG), []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out[0])))
    assert not model(TOKENS).logits_BTV.any()
    assert len(seen) == 2 and all(torch.equal(a, b) for a, b in seen)


def test_time_class_and_every_token_reach_the_output():
    model = spread(build(CONFIG)).eval()
    given = {"state_BTC": torch.randn(2, 8, 1), "time_B": torch.tensor([0.3, 0.6]), "label_B": torch.tensor([1, 2])}
    base = model(TOKENS, given=given).logits_BTV
    assert torch.equal(base, model(TOKENS + 0, given=given).logits_BTV) and base.shape == (2, 8, 1)
    moved = {"time_B": torch.tensor([0.3, 0.7]), "label_B": torch.tensor([1, 3])}
    for key, value in moved.items():
        other = model(TOKENS, given={**given, key: value}).logits_BTV
        assert torch.allclose(other[0], base[0], atol=1e-5) and not torch.allclose(other[1], base[1], atol=1e-3)
    state = given["state_BTC"].clone()
    state[:, -1] += 1
    assert not torch.allclose(model(TOKENS, given={**given, "state_BTC": state}).logits_BTV[:, 0], base[:, 0])


def test_all_gates_of_raw_weights_sum_to_one_when_all_experts_are_on():
    out = build(replace(CONFIG, top_k=4))(TOKENS)
    torch.testing.assert_close(out.routings[0].weights_TK.sum(1), torch.ones(16))
    assert not build(CONFIG).eval()(TOKENS).losses and set(build(CONFIG)(TOKENS).losses) == {"balance"}


class Known:
    """The true velocity, of samples that are all `data`."""

    levels = (14, 31)

    def __init__(self, data):
        self.data = data

    def state_of(self, tokens_BT):
        return self.data.expand(*tokens_BT.shape, 1)

    def __call__(self, tokens_BT, *, step, rng, given):
        t = given["time_B"][:, None, None]
        return Output((given["state_BTC"] - self.data) / t)


def test_the_true_velocity_has_no_error_and_leads_to_the_sample():
    data, rng = torch.linspace(-1, 1, 6)[None, :, None], torch.Generator().manual_seed(0)
    ids = torch.tensor([[14] * 6 + [3, 31]] * 2)
    outcome = RectifiedFlow()(Known(data), Batch(ids, ids, torch.zeros(2).long()), 0, rng)
    assert outcome.loss.item() == pytest.approx(0.0, abs=1e-8)
    found = draw(Known(data), torch.tensor([3, -1]), 6, steps=4, guidance=2.0, rng=rng)
    torch.testing.assert_close(found, data.expand(2, 6, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_class_is_dropped_as_often_as_asked_and_the_router_is_told(share):
    seen = []

    class Watched(Known):
        def __call__(self, tokens_BT, *, step, rng, given):
            seen.append(given)
            return super().__call__(tokens_BT, step=step, rng=rng, given=given)

    ids = torch.tensor([[14] * 6 + [3, 31]] * 4)
    RectifiedFlow(unconditional=share)(Watched(torch.zeros(1, 1, 1)), Batch(ids, ids, torch.zeros(4)), 0, torch.Generator())
    assert seen[0]["label_B"].tolist() == [-1 if share else 3] * 4
    assert bool((seen[0]["unconditional_T"] == bool(share)).all()) and len(seen[0]["unconditional_T"]) == 24


def test_refused():
    ids = torch.tensor([[14] * 6 + [3, 31]])
    with pytest.raises(InputError, match="architecture dit"):
        RectifiedFlow()(build(replace(CONFIG, architecture="decoder")), Batch(ids, ids, torch.zeros(1)), 0, torch.Generator())
    with pytest.raises(InputError):
        build(replace(CONFIG, architecture={"name": "dit", "levels": [9, 3]}))
