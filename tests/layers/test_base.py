"""BASE: balanced assignments by auction and exactly; the layer is the identity at the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.base import assign, auction, base
from tests.layers.sites import context, inputs, made


def total(scores, experts):
    return float(scores.gather(1, experts[:, None]).sum())


@pytest.mark.parametrize("solver", ["auction", "exact"])
def test_equal_loads_in_training(solver):
    routing = made(base, solver=solver)(inputs(64), context(64))
    assert torch.bincount(routing.experts_TK[:, 0], minlength=8).tolist() == [8] * 8
    torch.testing.assert_close(routing.weights_TK, routing.logits_TE.gather(1, routing.experts_TK).sigmoid())


@pytest.mark.parametrize(("tokens", "experts", "seed"), [(12, 3, 0), (64, 8, 1), (40, 4, 2), (7, 7, 3), (96, 2, 4)])
def test_solvers_against_scipy(tokens, experts, seed):
    scores = inputs(tokens, experts, seed=seed).double()
    each = tokens // experts
    cost = np.repeat(scores.numpy(), each, axis=1)
    best = cost[linear_sum_assignment(cost, maximize=True)].sum()
    assert total(scores, assign(scores, "exact")) == pytest.approx(best)
    found = auction(scores)
    epsilon = float(scores.max() - scores.min()) / 50
    assert torch.bincount(found, minlength=experts).tolist() == [each] * experts
    assert best - tokens * epsilon <= total(scores, found) <= best + 1e-9
    assert total(scores, found) > total(scores, torch.arange(tokens) % experts), "better than any assignment that fits"


def test_skewed_scores_are_balanced_too():
    scores = inputs(80, 8) + torch.linspace(5, -5, 8)
    for solver in ("auction", "exact"):
        assert torch.bincount(assign(scores, solver), minlength=8).tolist() == [10] * 8


def test_equal_and_infinite_scores_end():
    for scores in (
        torch.zeros(24, 8),
        torch.full((24, 8), -torch.inf),
        inputs(24, 8).index_fill(1, torch.tensor([2]), -torch.inf),
    ):
        assert torch.bincount(assign(scores), minlength=8).tolist() == [3] * 8


@pytest.mark.parametrize("solver", ["auction", "exact"])
def test_tokens_that_do_not_divide(solver):
    found = assign(inputs(21, 8), solver)
    assert found.shape == (21,) and int(torch.bincount(found).max()) <= 3


def test_an_auction_that_does_not_end_is_solved_exactly(monkeypatch):
    monkeypatch.setattr("moestro.layers.routers.base._MOST_ROUNDS", 1)
    scores = inputs(64, 8) + torch.linspace(5, -5, 8)
    assert auction(scores.double()) is None
    assert torch.equal(assign(scores), assign(scores, "exact"))


def test_evaluation_takes_the_best_and_training_sees_the_batch():
    router, x, other = made(base), inputs(64), inputs(64)
    routing = router(x, context(64, training=False))
    assert torch.equal(routing.experts_TK[:, 0], routing.logits_TE.argmax(1))
    other[8:] = inputs(64, seed=1)[8:]
    early = [router(y, context(64)).experts_TK[:8] for y in (x, other)]
    assert not torch.equal(*early), "the first sequence's routing changed with later ones: the leak of training"


def test_the_layer_is_the_identity_at_the_start():
    config = MoEConfig(
        vocabulary=32, d_model=16, layers=1, heads=2, d_expert=8, router="base", experts={"name": "sublayers", "depth": 2}
    )
    model = build(config)
    block = model.layers[0].block
    x = inputs()
    assert bool((block(x, context()).y_TD == 0).all())
    block(x, context()).y_TD.sum().backward()
    assert float(block.experts.down_nEDF[1].grad.abs().sum()) > 0
    gram = block.router.score.gate.weight.detach()
    torch.testing.assert_close(gram @ gram.t(), 0.01 * torch.eye(8), atol=1e-6, rtol=0)


def test_sublayers_written_out():
    config = MoEConfig(
        vocabulary=32, d_model=16, layers=1, heads=2, num_experts=3, d_expert=8, experts={"name": "sublayers", "depth": 2}
    )
    bank = build(config).layers[0].block.experts
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.5)
    x, e = inputs(5), 1
    h = x
    for n in range(2):
        normed = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        normed = normed * bank.scale_nED[n][e] + bank.shift_nED[n][e]
        inner = (normed @ bank.up_nEFD[n][e].t() + bank.up_nEF[n][e]).relu()
        h = h + inner @ bank.down_nEDF[n][e].t() + bank.down_nED[n][e]
    torch.testing.assert_close(bank.output(x, e), h - x)
