"""MoE++: cost-free experts, the gate's residual, loss and capacity by kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext, Tap
from moestro.layers.banks.constant import constant
from moestro.layers.banks.copy import copy
from moestro.layers.banks.zero import zero
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.experts import Joined
from moestro.layers.losses.balance import balance
from moestro.layers.routers.moe_plus_plus import STATE, costed, moe_plus_plus
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, inputs, made, site, with_bank

COPY, ZERO, E = 10, 11, 12


def where(**changes):
    base = with_bank(site(**changes))
    banks = [base.experts, constant(base, count=2), copy(base), zero(base)]
    return replace(base, num_experts=E, experts=Joined(banks))


def forced(*experts):
    """A tap that makes every token choose these."""

    def fn(z, ctx):
        out = torch.full_like(z, -50.0)
        out[:, list(experts)] = z[:, list(experts)]
        return out

    return Tap("logits", fn)  # fmt: skip


def test_feed_forward_only_is_plain_top_k():
    router = made(moe_plus_plus, where()).tapped(forced(*range(8)))
    plain = made(topk, site())
    with torch.no_grad():
        plain.score.gate.weight.copy_(router.score.own.weight[:8])
    a, b = router(inputs(), context(training=False)), plain(inputs(), context(training=False))
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


@pytest.mark.parametrize("other", [3, COPY])
def test_zero_beside_another_leaves_the_other_whole(other):
    at = where()
    routing = made(moe_plus_plus, at).tapped(forced(other, ZERO))(inputs(), context(training=False))
    assert bool((routing.experts_TK == ZERO).any(1).all())
    expected = inputs() if other == COPY else at.experts.output(inputs(), other)
    torch.testing.assert_close(at.experts.run(inputs(), routing), expected)


def test_two_zero_experts_chosen_give_zero_not_nan():
    base = with_bank(site())
    at = replace(base, num_experts=10, experts=Joined([base.experts, zero(base, count=2)]))
    routing = made(moe_plus_plus, at).tapped(forced(8, 9))(inputs(), context(training=False))
    assert bool((routing.weights_TK == 0).all()) and bool((at.experts.run(inputs(), routing) == 0).all())


def test_cost_free_experts_have_few_parameters():
    for bank in where().experts.banks[1:]:
        assert sum(p.numel() for p in bank.parameters()) <= 2 * 3 * 16


def test_the_gate_sees_the_logits_before():
    router = made(moe_plus_plus, where(layer=1, layers=2))
    before, ctx = torch.randn(24, E), context(training=False)
    assert bool((router.score.before.weight == 0).all())
    with torch.no_grad():
        router.score.before.weight.normal_()
    ctx.carry[STATE] = before
    found = router(inputs(), ctx).logits_TE
    expected = inputs() @ router.score.own.weight.t() + before @ router.score.before.weight.t()
    torch.testing.assert_close(found, expected)
    assert ctx.carry[STATE] is found, "the next layer sees these"
    assert made(moe_plus_plus, where()).score.before is None, "the first layer has none before it"


def test_the_residual_reaches_the_first_layer_of_a_model():
    config = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, d_expert=8, router="moe_plus_plus", special=("copy", "zero"))
    model = build(config)
    gates = [layer.block.router.score for layer in model.layers]
    with torch.no_grad():
        gates[1].before.weight.normal_()
    out = model(torch.arange(8)[None])
    out.routings[1].weights_TK.square().sum().backward()
    assert float(gates[0].own.weight.grad.abs().sum()) > 0


def test_the_loss_by_hand_and_with_tau_1_the_balance_loss():
    at = where()
    for tau in (0.25, 1.0):
        router = made(moe_plus_plus, at, tau=tau, balance=0.5)
        decision = router.decide(inputs(), context())
        f_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=E) / 24
        eta_E = torch.tensor([1.0] * 8 + [tau] * 4)
        assert torch.equal(costed(at, tau), eta_E)
        p_E = decision.probs_TE.mean(0)
        torch.testing.assert_close(router.penalties(decision)["balance"], 0.5 * (eta_E * f_E * p_E).sum())
    torch.testing.assert_close((eta_E * f_E * p_E).sum(), balance(f_E, p_E) / E)


def test_capacity_by_kind():
    router = made(moe_plus_plus, where(), tau=0.5, capacity=1.0)
    limits = router.taps[0].fn.limits(160)
    assert limits == [10] * 8 + [20] * 4 and sum(limits) == 160, "work is bounded to tau of what costs nothing may take"
    x = torch.ones(80, 16)  # all tokens choose alike
    routing = router(x, RouteContext(training=True))
    load = torch.bincount(routing.experts_TK.flatten() + 1, minlength=E + 1)[1:]
    assert sorted(load[load > 0].tolist()) in ([20, 20], [10, 20], [10, 10])
    first = router(x, RouteContext()).experts_TK[0]
    assert bool((routing.experts_TK[:10] == first).all()), "the first tokens have places"
    assert bool((router(x, RouteContext()).experts_TK >= 0).all()), "evaluation drops nothing"


def test_the_deep_gate():
    router = made(moe_plus_plus, where(), deep=True)
    assert [tuple(p.shape) for p in router.score.own.parameters()] == [(8 * E, 16), (E, 8 * E)]
    first, second = router.score.own[0].weight, router.score.own[2].weight
    expected = (inputs() @ first.t()).tanh() @ second.t()
    torch.testing.assert_close(router(inputs(), context()).logits_TE, expected)


def test_what_cannot_be():
    with pytest.raises(InputError):
        made(moe_plus_plus, where(), tau=0.0)
