"""EvoMoE: the dense-to-sparse gate, and the phase that makes many experts of one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Routing
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.evomoe import evomoe
from moestro.layers.taps.single_expert import SingleExpert
from moestro.train.phases.diversify import Diversify
from tests.layers.sites import chosen, context, dense, inputs, made


def test_a_hot_gate_is_even_and_dense():
    routing = made(evomoe, temperature=1e5, gumbel_weights=True)(inputs(), context())
    assert bool((routing.experts_TK >= 0).all()) and routing.slots == 8
    torch.testing.assert_close(routing.weights_TK, torch.full((24, 8), 1 / 8), atol=1e-3, rtol=0)


def test_a_cold_gate_takes_one_expert_as_often_as_the_softmax_says():
    router = made(evomoe, temperature=1e-3, threshold=0.5)
    x = inputs(1).expand(6000, 16) * 0.5
    routing = router(x, context(6000))
    assert routing.slots == 1
    share_E = torch.bincount(routing.experts_TK[:, 0], minlength=8) / 6000
    p_E = routing.logits_TE[0].softmax(-1).detach()
    assert float(((share_E - p_E).abs() / (p_E * (1 - p_E) / 6000).sqrt()).max()) < 4.5


def test_fewer_experts_as_the_temperature_falls():
    router = made(evomoe, temperature={"start": 2.0, "end": 0.02, "steps": 100, "shape": "exponential"})
    active = [float(chosen(router(inputs(200), context(200, step=step))).float().sum(1).mean()) for step in range(0, 101, 10)]
    assert active[0] > 7.8 and active[-1] < 1.5 and active == sorted(active, reverse=True)


def test_weights_of_both_kinds():
    for gumbel in (False, True):
        routing = made(evomoe, temperature=0.5, threshold=0.05, gumbel_weights=gumbel)(inputs(), context())
        kept = chosen(routing)
        assert torch.equal(kept, routing.probs_TE > 0.05) and not bool(kept.all())
        weights = routing.probs_TE if gumbel else routing.logits_TE.softmax(-1)
        torch.testing.assert_close(dense(routing), (weights * kept).detach())


def test_evaluation_takes_the_best_with_its_probability():
    routing = made(evomoe)(inputs(), context(training=False))
    torch.testing.assert_close(routing.weights_TK, routing.logits_TE.softmax(-1).amax(1, keepdim=True))
    assert torch.equal(routing.experts_TK[:, 0], routing.logits_TE.argmax(1))


def test_the_loss_by_hand():
    router = made(evomoe, balance=0.5, temperature=0.2)
    decision = router.decide(inputs(), context())
    g_E, s_E = decision.probs_TE.mean(0), chosen(decision.chosen).float().mean(0)
    torch.testing.assert_close(router.penalties(decision)["balance"], 0.5 * 64 * (g_E * s_E).mean())


CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, num_experts=4, d_expert=8, router="evomoe", init_std=0.3)


def phased(model, step, **options):
    return Diversify(at=0.5, **options)(model, torch.optim.SGD(model.parameters(), lr=0.1), step, 10)


@pytest.mark.parametrize("training", [True, False])
def test_before_the_turn_every_token_goes_to_expert_0(training):
    model = build(CONFIG).train(training)
    assert phased(model, 4) == {"stage": 1.0}
    block, x = model.layers[0].block, inputs()
    torch.testing.assert_close(block(x, context(training=training)).y_TD, block.experts.output(x, 0))
    assert phased(model, 5) == {"stage": 2.0}
    assert not torch.allclose(block(x, context(training=training)).y_TD, block.experts.output(x, 0))


@pytest.mark.parametrize("bank", ["stacked", "sublayers"])
def test_without_perturbation_the_block_is_expert_0_for_weights_that_sum_to_1(bank):
    model = build(replace(CONFIG, experts=bank))
    bank = model.layers[1].block.experts
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    expected = bank.output(inputs(), 0)
    phased(model, 5, mask=0.0)
    weights = torch.rand(24, 4).softmax(1)
    found = bank.run(inputs(), Routing(torch.arange(4).expand(24, 4), weights))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_each_copy_is_masked_on_its_own():
    model = build(replace(CONFIG, d_expert=64))
    first = model.layers[0].block.experts.gate_up_EFD[0].clone()
    phased(model, 5, mask=0.25)
    copies = model.layers[0].block.experts.gate_up_EFD
    assert float((copies == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert bool(((copies == 0) | (copies == first)).all())
    assert not any(torch.equal(copies[i], copies[j]) for i in range(4) for j in range(i))
    noisy = build(replace(CONFIG, d_expert=64))
    phased(noisy, 5, mask=0.0, noise=0.5)
    apart = noisy.layers[0].block.experts.gate_up_EFD - first
    assert float((apart.std() / first.std()).detach()) == pytest.approx(0.5, abs=0.03)


def test_the_optimiser_forgets_the_experts_only():
    model = build(CONFIG)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    Diversify(at=0.5)(model, optimiser, 0, 4)
    model(torch.arange(8)[None]).logits_BTV.square().mean().backward()
    optimiser.step()
    experts = [p for layer in model.layers for p in layer.block.experts.parameters()]
    assert all(p in optimiser.state for p in experts)
    before = len(optimiser.state)
    Diversify(at=0.5)(model, optimiser, 2, 4)
    assert not any(p in optimiser.state for p in experts) and len(optimiser.state) == before - len(experts)


def test_any_router_with_the_tap_and_special_experts_too():
    model = build(replace(CONFIG, router="topk", taps=("single_expert",), special=("zero",)))
    assert phased(model, 0) == {"stage": 1.0} and phased(model, 5) == {"stage": 2.0}
    assert sum(isinstance(m, SingleExpert) for m in model.modules()) == 2


@pytest.mark.parametrize("changes", [{"router": "topk"}, {"experts": "widths"}, {"experts": "low_rank"}])
def test_models_that_cannot_be_diversified(changes):
    with pytest.raises(InputError):
        phased(build(replace(CONFIG, **changes)), 5)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"threshold": 1.0}])
def test_what_cannot_be(options):
    with pytest.raises(InputError):
        made(evomoe, **options)
    with pytest.raises(InputError):
        Diversify(mask=1.0)
