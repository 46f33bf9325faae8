"""SMoE-Dropout: a frozen router and a growing number of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.smoe_dropout import smoe_dropout
from tests.layers.sites import context, inputs, made, site, with_bank

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=1, heads=2, num_experts=8, d_expert=8, router="smoe_dropout")


def test_the_router_is_the_same_bits_after_training():
    model = build(CONFIG)
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        out = model(tokens, step=step)
        assert out.losses == {}
        torch.nn.functional.cross_entropy(out.logits_BTV.flatten(0, 1), tokens.flatten()).backward()
        optimiser.step()
    after = model.state_dict()
    frozen = [key for key in after if ".router." in key]
    assert sorted(key.rsplit(".", 1)[-1] for key in frozen) == ["bias_E", "weight_ED"]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not any(torch.equal(before[key], after[key]) for key in after if ".experts." in key)


def test_all_experts_are_the_dense_softmax_mixture():
    where = with_bank(site())
    routing = made(smoe_dropout, where)(inputs(), context(training=False))
    expected = sum(routing.probs_TE[:, e : e + 1] * where.experts.output(inputs(), e) for e in range(8))
    torch.testing.assert_close(where.experts.run(inputs(), routing), expected)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_k_never_falls_and_meets_its_ends(shape):
    router = made(smoe_dropout, least=3, most=7, steps=50, shape=shape)
    slots = [router(inputs(), context(step=step)).slots for step in range(0, 80, 2)]
    assert slots[0] == 3 and slots[25:] == [7] * 15 and sorted(slots) == slots and set(slots) == {3, 4, 5, 6, 7}
    assert router(inputs(), context(step=0, training=False)).slots == 7


def test_weights_are_a_softmax_of_the_chosen():
    routing = made(smoe_dropout)(inputs(), context())
    assert routing.slots == 4
    torch.testing.assert_close(routing.weights_TK, routing.logits_TE.gather(1, routing.experts_TK).softmax(1))


def test_one_trained_model_runs_at_any_k():
    trained = build(CONFIG)
    for k in (1, 2, 8):
        slim = build(replace(CONFIG, router={"name": "smoe_dropout", "inference": k})).eval()
        slim.load_state_dict(trained.state_dict())
        assert slim(torch.arange(8)[None]).routings[0].slots == k


@pytest.mark.parametrize("options", [{"most": 9}, {"least": 5, "most": 4}, {"inference": 9}, {"shape": "bent"}, {"steps": 0}])
def test_what_cannot_be(options):
    with pytest.raises(InputError):
        made(smoe_dropout, **options)
