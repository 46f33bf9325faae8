"""Chain-of-Experts: one pass is the plain block, tied passes repeat it, untied routers learn apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext
from moestro.layers.config import MoEConfig, Part
from moestro.layers.decoder import build, site_of
from tests.layers.sites import context, inputs

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, num_experts=8, top_k=2, d_expert=8, d_shared=8, init_std=0.3)


def block(passes=2, **options):
    torch.manual_seed(0)
    return Part("chain", {"passes": passes, **options}).make("block", site_of(CONFIG, 0, {}))


def test_one_pass_is_the_plain_layer_bit_for_bit():
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    plain = build(CONFIG)
    chained = build(replace(CONFIG, block={"name": "chain", "passes": 1}))
    chained.load_state_dict({k.replace(".block.", ".block.steps.0."): v for k, v in plain.state_dict().items()})
    assert torch.equal(plain(tokens).logits_BTV, chained(tokens).logits_BTV)


def test_tied_passes_are_the_layer_applied_twice():
    made, x = block(tied=True), inputs()
    step = made.steps[0]
    assert step is not made.steps[1] and step.router is made.steps[1].router
    once = x + step(x, RouteContext()).y_TD
    twice = once + step(once, RouteContext()).y_TD
    torch.testing.assert_close(made(x, RouteContext()).y_TD, twice - x)
    torch.testing.assert_close(block(tied=True, output="stream")(x, RouteContext()).y_TD, twice)


def test_each_token_makes_passes_times_k_calls_with_routers_of_their_own():
    made = block(3)
    out = made(inputs(), context())
    assert len(out.routings) == 3 and all(int((r.experts_TK >= 0).sum()) == 24 * 2 for r in out.routings)
    assert len({id(step.experts) for step in made.steps}) == 1 and len({id(step.shared) for step in made.steps}) == 1
    out.y_TD.square().sum().backward()
    grads = [step.router.score.gate.weight.grad for step in made.steps]
    assert all(float(g.abs().sum()) > 0 for g in grads) and not torch.allclose(grads[0], grads[1])
    assert {"balance"} == set(out.losses)


def test_inside_a_model_the_routings_are_in_order_and_controllers_find_theirs():
    model = build(replace(CONFIG, block="chain", taps=({"name": "loss_free", "rate": 0.1},)))
    out = model(torch.randint(0, 32, (2, 8)), step=0, rng=torch.Generator().manual_seed(0))
    controllers = list(model.controllers())
    assert len(out.routings) == 4 and [c.layer for c in controllers] == [0, 1, 2, 3]
    for controller in controllers:
        controller.after_step([out.light()], 0)
        count = torch.bincount(out.routings[controller.layer].experts_TK.flatten(), minlength=8).float()
        assert torch.equal(controller.bias_E.sign(), (count.mean() - count).sign())


@pytest.mark.parametrize("options", [{"passes": 0}, {"output": "both"}])
def test_refused(options):
    with pytest.raises(InputError):
        block(**options)
