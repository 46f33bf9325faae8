"""LocMoE: group means, locality and the bound on capacity."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Routing
from moestro.layers.router import Decision
from moestro.layers.routers.locmoe import GroupMeans, least_capacity, locmoe
from tests.layers.sites import chosen, context, inputs, made, site


def test_the_gate_is_constant_with_orthogonal_rows():
    router = made(locmoe)
    assert not list(router.parameters())
    rows_ED = GroupMeans(8, 0.0)(torch.eye(16), context()).t()
    torch.testing.assert_close(rows_ED @ rows_ED.t(), 8 / 16 * torch.eye(8))
    x = inputs()
    torch.testing.assert_close(router(x, context()).logits_TE, x @ rows_ED.t())


def test_top_1_of_the_rectified_means():
    router = made(locmoe, capacity=0.0)
    routing = router(inputs(), context())
    p_TE = routing.logits_TE.relu().softmax(-1)
    assert torch.equal(routing.experts_TK[:, 0], routing.logits_TE.argmax(1))
    torch.testing.assert_close(routing.weights_TK, p_TE.gather(1, routing.experts_TK))
    double = made(locmoe, capacity=0.0, scale=2.0)(inputs(), context())
    torch.testing.assert_close(double.weights_TK, 2 * routing.weights_TK)


def test_a_token_without_positive_group_takes_the_largest_mean():
    x = -torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) - 0.1
    routing = made(locmoe, capacity=0.0)(x, context(20))
    assert torch.equal(routing.experts_TK[:, 0], x.unflatten(1, (8, 2)).mean(-1).argmax(1))
    torch.testing.assert_close(routing.weights_TK, torch.full((20, 1), 1 / 8))


def decision(probs, ctx):
    routing = Routing(probs.argmax(1, keepdim=True), torch.ones(len(probs), 1), probs.log(), probs)
    return Decision(inputs(len(probs)), ctx, routing, routing)


def test_locality_is_0_only_when_all_mass_is_local():
    loss = made(locmoe, nodes=2, locality=1.0, far=1e-6).losses["locality"]
    local = torch.zeros(16, 8)
    local[:8, :4], local[8:, 4:] = 0.25, 0.25  # sequences 0 and 1 are the tokens of nodes 0 and 1
    assert float(loss(decision(local, context(16)))) == pytest.approx(0, abs=1e-5)
    away = local.roll(4, 1)
    assert float(loss(decision(away, context(16)))) == pytest.approx(math.log(0.25 / (1e-6 / 8)), rel=1e-4)
    half = (local + away) / 2
    assert 0.1 < float(loss(decision(half, context(16)))) < float(loss(decision(away, context(16))))


def test_nodes_may_be_given():
    loss = made(locmoe, nodes=2, locality=1.0).losses["locality"]
    probs = torch.zeros(8, 8)
    probs[:, 4:] = 0.25
    ctx = context(8)
    assert float(loss(decision(probs, ctx))) > 1
    ctx.carry["node_T"] = torch.ones(8, dtype=torch.int64)
    assert float(loss(decision(probs, ctx))) < 0.05


def test_features_learn_to_stay_local():
    """The gate cannot learn; what comes in can, and more of it stays the larger mu is."""
    remote = []
    for mu in (0.0, 0.01, 0.1):
        router = made(locmoe, locality=mu, balance=1.0, capacity=0.0)
        x = torch.nn.Parameter(inputs(64))
        optimiser = torch.optim.Adam([x], lr=0.02)
        for step in range(40):
            optimiser.zero_grad()
            d = router.decide(x, context(64, step=step))
            sum(router.penalties(d).values()).backward()
            optimiser.step()
        experts = router(x, context(64)).experts_TK[:, 0]
        remote.append(float((experts // 4 != torch.arange(64) // 8 % 2).float().mean()))
        assert int(torch.bincount(experts, minlength=8).max()) < 32
    assert remote[0] > remote[1] + 0.1 > remote[2] + 0.2


def test_the_bound_is_what_sampling_finds():
    d, n, delta = 16, 8, 0.3
    directions = torch.nn.functional.normalize(inputs(40000, d), dim=1)
    share = float((directions[:, 0].abs() > delta).float().mean())
    assert least_capacity(n, d, delta) == pytest.approx(1 / (n * share), rel=0.03)
    assert least_capacity(8, 4096, 0.03) > math.exp(0.03**2 * 4096 / (2 - 0.03**2)) / 8


def test_capacity_is_bounded_below():
    x = inputs(1).expand(40, 16)
    for delta, expected in ((0.03, math.ceil(1.1 * 40 / 8)), (0.8, math.ceil(least_capacity(8, 16, 0.8)))):
        routing = made(locmoe, delta=delta)(x, context(40))
        assert int(chosen(routing).sum()) == min(40, expected)
    assert int(chosen(made(locmoe)(x, context(40, training=False))).sum()) == 40


@pytest.mark.parametrize("options", [{"nodes": 3}, {"far": 0.0}, {"delta": 1.0}])
def test_what_cannot_be(options):
    with pytest.raises(InputError):
        made(locmoe, **options)
    with pytest.raises(InputError, match="width 18"):
        made(locmoe, site(d_model=18))
