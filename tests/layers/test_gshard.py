"""GShard's gate and its ST-MoE form: closed forms of weights, drops and losses."""

from __future__ import annotations

import math

import torch

from moestro.layers.routers.gshard import gshard
from moestro.layers.routers.st_moe import st_moe
from tests.layers.sites import chosen, context, dense, inputs, made, site


def test_without_randomness_and_limits_it_is_the_masked_softmax():
    x, router = inputs(), made(gshard, random_second=False, capacity=0.0)
    routing = router(x, context())
    best = routing.logits_TE.topk(2, -1).indices
    masked = torch.full_like(routing.logits_TE, -math.inf).scatter(1, best, routing.logits_TE.gather(1, best))
    torch.testing.assert_close(dense(routing), masked.softmax(-1).detach())


def test_evaluation_keeps_both():
    routing = made(gshard)(inputs(), context(training=False))
    assert bool((chosen(routing).sum(1) == 2).all())
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(24))


def test_the_second_stays_as_often_as_twice_its_weight():
    n = 4000
    x = inputs(1).expand(n, 16)
    router = made(gshard, capacity=0.0)
    full = router(x[:1], context(1, training=False))
    wanted = min(1.0, 2 * float(full.weights_TK[0, 1].detach()))
    assert 0.05 < wanted < 0.95, "the case must be able to fail"
    kept = (router(x, context(n)).experts_TK[:, 1] >= 0).float().mean()
    assert abs(float(kept) - wanted) < 4 / math.sqrt(n)


def test_first_choices_come_before_second_ones():
    """All tokens want experts 0 and 1 in this order, the last token in the other: it displaces an earlier second choice."""
    tokens, router = 8, made(gshard, random_second=False, capacity=1.0)
    x = torch.zeros(tokens, 16)
    x[:, 0], x[-1, 0] = 1.0, -1.0
    with torch.no_grad():
        router.score.gate.weight.zero_()
        router.score.gate.weight[:2, 0] = torch.tensor([0.2, -0.2])
        router.score.gate.weight[:2, 1] = 5.0
        x[:, 1] = 1.0
    limit = math.ceil(1.0 * tokens * 2 / 8)
    routing = router(x, context(tokens))
    assert chosen(routing).sum(0).tolist() == [limit, limit] + [0] * 6
    assert routing.experts_TK[:, 0].tolist() == [0, 0, -1, -1, -1, -1, -1, 1]
    assert routing.experts_TK[:, 1].tolist() == [1] + [-1] * 7, "one place of expert 1 is the last token's first choice"


def test_renormalised_after_drops():
    routing = made(gshard, capacity=0.5, renormalise=True)(inputs(64), context(64))
    sums, left = routing.weights_TK.sum(1), (routing.experts_TK >= 0).any(1)
    assert 0 < int(left.sum()) < 64
    torch.testing.assert_close(sums, left.float())


def test_the_loss_counts_first_choices():
    router = made(gshard, balance=0.01)
    decision = router.decide(inputs(), context())
    first = torch.bincount(decision.probs_TE.argmax(1), minlength=8) / 24
    expected = 0.01 * 8 * (first * decision.probs_TE.mean(0)).sum()
    torch.testing.assert_close(router.penalties(decision)["balance"], expected)


def test_gumbel_draws_the_second_in_proportion():
    n, logits = 20000, torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    where = site(d_model=1, num_experts=4)
    router = made(gshard, where, gumbel=True, random_second=False, capacity=0.0)
    with torch.no_grad():
        router.score.gate.weight.copy_(logits.t())
    second = router(torch.ones(n, 1), context(n)).experts_TK[:, 1]
    found = torch.bincount(second, minlength=4)[1:] / n
    torch.testing.assert_close(found, logits[0, 1:].softmax(0), atol=0.02, rtol=0)


def test_st_moe_is_gshard_with_the_z_loss():
    x = inputs()
    a, b = made(st_moe), made(gshard, capacity=1.25)
    one, other = a.decide(x, context()), b.decide(x, context())
    assert torch.equal(dense(one.routing), dense(other.routing))
    losses = a.penalties(one)
    torch.testing.assert_close(losses["balance"], b.penalties(other)["balance"])
    torch.testing.assert_close(losses["z"], 0.001 * one.logits_TE.logsumexp(-1).square().mean())
