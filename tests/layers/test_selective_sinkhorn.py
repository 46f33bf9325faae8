"""Selective Sinkhorn: the plan's marginals, when it is used, and what it costs in causality."""

from __future__ import annotations

import pytest
import torch

from moestro.layers.routers.selective_sinkhorn import selective_sinkhorn, sinkhorn
from moestro.layers.routers.topk import topk
from tests.layers.sites import chosen, context, dense, inputs, made


@pytest.mark.parametrize(("cost", "xi"), [("softmax", 0.05), ("logits", 1.0)])
def test_marginals(cost, xi):
    logits = inputs(48, 8) + torch.linspace(2, -2, 8)
    score = logits.softmax(-1) if cost == "softmax" else logits
    plan = sinkhorn(score, xi, 1e-4, 2000)
    torch.testing.assert_close(plan.sum(1), torch.ones(48))
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 6.0), rtol=1e-4, atol=0)


def test_equal_to_the_iteration_without_logarithms():
    score = inputs(12, 4).double()
    kernel, u = (score / 0.7).exp(), torch.ones(12, dtype=torch.float64)
    for _ in range(9):
        v = 3 / (kernel.t() @ u)
        u = 1 / (kernel @ v)
    torch.testing.assert_close(sinkhorn(score, 0.7, 0.0, 9), u[:, None] * kernel * v)


def test_large_scores_and_large_xi():
    assert bool(sinkhorn(1e4 * inputs(12, 4), 0.05, 1e-4, 20).isfinite().all())
    torch.testing.assert_close(sinkhorn(inputs(12, 4), 1e6, 1e-6, 50), torch.full((12, 4), 0.25), atol=1e-5, rtol=0)


def test_q_0_is_top_k_bit_for_bit():
    x = inputs()
    a, b = made(selective_sinkhorn, q=0.0, noise=0.0)(x, context()), made(topk)(x, context())
    assert torch.equal(a.experts_TK, b.experts_TK) and torch.equal(a.weights_TK, b.weights_TK)


def test_evaluation_is_top_k_without_noise():
    x = inputs()
    a = made(selective_sinkhorn, q=1.0)(x, context(training=False))
    assert torch.equal(dense(a), dense(made(topk)(x, context())))


def test_a_share_q_of_the_calls_is_balanced():
    router, x = made(selective_sinkhorn, q=0.3, noise=0.0, rounds=1), inputs()
    plain = router(x, context(training=False)).probs_TE
    planned = [not torch.equal(router(x, context(seed=seed)).probs_TE, plain) for seed in range(400)]
    assert abs(sum(planned) / 400 - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5
    assert torch.equal(dense(router(x, context(seed=7))), dense(router(x, context(seed=7))))


def test_a_balanced_call_evens_a_collapsed_router():
    x, router = inputs(64), made(selective_sinkhorn, q=1.0)
    x[:, 0] = 1.0
    with torch.no_grad():
        router.score.gate.weight[:, 0] = torch.linspace(6, -6, 8)
    load, plain = (chosen(router(x, context(64, training=t))).sum(0).float() for t in (True, False))
    assert float(load.max()) < 0.8 * float(plain.max())
    assert int((plain == 0).sum()) >= 4 > 0 == int((load == 0).sum()), "dead experts get tokens"


@pytest.mark.parametrize("differentiable", [False, True])
def test_gradient_through_the_plan_is_an_option(differentiable):
    router = made(selective_sinkhorn, q=1.0, differentiable=differentiable)
    weights = router(inputs(), context()).weights_TK
    assert weights.requires_grad == differentiable
    if differentiable:
        (weights * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        assert float(router.score.gate.weight.grad.abs().sum()) > 0


def test_the_plan_leaks_later_tokens_in_training():
    router, a, b = made(selective_sinkhorn, q=1.0), inputs(), inputs()
    b[8:] = 3 * inputs(seed=1)[8:]
    for training in (True, False):
        early = [dense(router(x, context(training=training)))[:8] for x in (a, b)]
        assert torch.equal(*early) != training
