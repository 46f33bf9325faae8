"""The balance loss in every scope and convention against closed forms, and the other losses."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext, Routing
from moestro.layers.losses import balance as module
from moestro.layers.losses.balance import Balance, balance
from moestro.layers.losses.entropy import Entropy
from moestro.layers.losses.importance import Importance
from moestro.layers.losses.z import ZLoss
from moestro.layers.router import Decision
from moestro.layers.schedule import Ramp, read, value_at
from moestro.layers.site import Site

E, K = 4, 2
SITE = Site(d_model=4, num_experts=E, top_k=K)


def decision(logits_TE, sequence_T=None, step=0, weights=None):
    probs = logits_TE.softmax(-1)
    experts = probs.topk(K, -1).indices
    routing = Routing(experts, probs.gather(1, experts) if weights is None else weights, logits_TE, probs)
    return Decision(torch.zeros(len(probs), 4), RouteContext(training=True, step=step, sequence_T=sequence_T), routing, routing)


def draw(tokens=12, seed=0):
    return (2 * torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed))).requires_grad_()


def by_hand(logits, divide=K):
    probs = logits.softmax(-1)
    counts = torch.bincount(probs.topk(K, -1).indices.flatten(), minlength=E).float()
    return E * (counts / (len(logits) * divide) * probs.mean(0)).sum()


def test_value_by_hand_and_uniform():
    logits = draw()
    torch.testing.assert_close(Balance(SITE, 0.5)(decision(logits)), 0.5 * by_hand(logits))
    torch.testing.assert_close(Balance(SITE, 1.0, convention="tokens")(decision(logits)), by_hand(logits, 1))
    uniform = torch.full((E,), 1 / E)
    assert float(balance(uniform, torch.tensor([0.7, 0.1, 0.1, 0.1]))) == pytest.approx(1)
    assert float(balance(torch.tensor([0.7, 0.1, 0.1, 0.1]), uniform)) == pytest.approx(1)


def test_it_may_be_below_one():
    f, p = torch.tensor([0.6, 0.4]), torch.tensor([0.6 * 0.51 + 0.4 * 0.01, 0.6 * 0.49 + 0.4 * 0.99])
    assert float(balance(f, p)) == pytest.approx(0.924)


def test_counts_have_no_gradient():
    f = torch.rand(E, requires_grad=True)
    p = torch.rand(E, requires_grad=True)
    balance(f, p).backward()
    assert f.grad is None
    torch.testing.assert_close(p.grad, E * f.detach())


def test_weights_and_groups():
    f, p = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    torch.testing.assert_close(balance(f, p, torch.tensor([2.0, 0, 0, 0])), torch.tensor(4 * 2 * 0.04))
    torch.testing.assert_close(balance(f, p, groups=2), torch.tensor(4 * (0.35 * 0.3 + 0.15 * 0.7)))
    torch.testing.assert_close(balance(f, p, groups=4), balance(f, p))


def test_sequence_scope_is_the_mean_over_sequences():
    logits = draw(12)
    sequence = torch.tensor([5] * 4 + [2] * 8)
    expected = (by_hand(logits[:4]) + by_hand(logits[4:])) / 2
    loss = Balance(SITE, 1.0, scope="sequence")
    torch.testing.assert_close(loss(decision(logits, sequence)), expected)
    torch.testing.assert_close(loss(decision(logits, torch.zeros(12, dtype=torch.int64))), by_hand(logits))


def test_first_slot_and_normalised_probs():
    logits = draw()
    probs = logits.softmax(-1)
    first = torch.bincount(probs.argmax(-1), minlength=E).float() / 12
    torch.testing.assert_close(Balance(SITE, 1.0, first_slot=True)(decision(logits)), E * (first * probs.mean(0)).sum())
    found = decision(logits)
    scaled = Decision(
        found.x_TD, found.ctx, Routing(found.chosen.experts_TK, found.chosen.weights_TK, logits, 3 * probs), found.routing
    )
    torch.testing.assert_close(Balance(SITE, 1.0, normalise=True)(scaled), by_hand(logits))


def test_synchronised_parts_have_the_gradient_of_one_large_batch(monkeypatch):
    """Two ranks: the mean of their gradients with summed counts is the gradient of the whole batch's loss."""
    logits = draw(16)
    (whole,) = torch.autograd.grad(by_hand(logits), logits)
    counts = torch.stack([torch.bincount(part.topk(K, -1).indices.flatten(), minlength=E) for part in logits.chunk(2)]).float()
    total = torch.cat((counts.sum(0), torch.tensor([16.0])))
    monkeypatch.setattr(module, "sum_over_ranks", lambda values: total)
    loss = Balance(SITE, 1.0, scope="global")
    parts = [torch.autograd.grad(loss(decision(part)), logits)[0] for part in logits.chunk(2)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_step_scope_accumulates_within_a_step_only():
    first, second = draw(8, 1), draw(8, 2)
    loss = Balance(SITE, 1.0, scope="step")
    torch.testing.assert_close(loss(decision(first, step=4)), by_hand(first))
    both = torch.cat((first, second))
    counts = torch.bincount(both.topk(K, -1).indices.flatten(), minlength=E).float() / (16 * K)
    torch.testing.assert_close(loss(decision(second, step=4)), E * (counts * second.softmax(-1).mean(0)).sum())
    torch.testing.assert_close(loss(decision(second, step=5)), by_hand(second))


def test_running_mean_of_equal_batches_is_the_batch():
    logits, loss = draw(), Balance(SITE, 1.0, scope="ema", decay=0.5)
    for step in range(3):
        torch.testing.assert_close(loss(decision(logits, step=step)), by_hand(logits))
    other = draw(seed=9)
    assert float(loss(decision(other, step=3)).detach()) != pytest.approx(float(by_hand(other).detach()))


def test_specialised_but_globally_balanced():
    """Each half of the batch uses two experts only: balanced as a whole, far from it within a micro-batch."""
    logits = torch.full((8, E), -9.0)
    logits[:4, :2], logits[4:, 2:] = 9.0, 9.0
    assert float(Balance(SITE, 1.0)(decision(logits))) == pytest.approx(1, abs=1e-4)
    assert float(Balance(SITE, 1.0)(decision(logits[:4]))) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("options", [{"scope": "galaxy"}, {"convention": "half"}, {"groups": 3}])
def test_options_that_cannot_be(options):
    with pytest.raises(InputError):
        Balance(SITE, 1.0, **options)


def test_z_loss_value_gradient_and_shift():
    logits = draw()
    loss = ZLoss(1.0)(decision(logits))
    lse = logits.logsumexp(-1)
    torch.testing.assert_close(loss, lse.square().mean())
    expected = 2 * lse[:, None] * logits.softmax(-1) / len(logits)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert float(ZLoss(1.0)(decision(torch.zeros(3, E)))) == pytest.approx(math.log(E) ** 2)
    shifted = (logits + 3).detach()
    assert float(ZLoss(1.0)(decision(shifted))) > float(loss.detach())
    torch.testing.assert_close(Balance(SITE, 1.0)(decision(shifted)), Balance(SITE, 1.0)(decision(logits.detach())))


def test_entropy():
    assert float(Entropy(1.0)(decision(torch.zeros(3, E)))) == pytest.approx(math.log(E))
    sharp = torch.full((3, E), -200.0).index_fill(1, torch.tensor([1]), 200.0).requires_grad_()
    loss = Entropy(1.0)(decision(sharp))
    assert float(loss.detach()) == 0
    assert bool(torch.autograd.grad(loss, sharp)[0].isfinite().all())


def test_importance():
    logits = torch.zeros(4, E)
    one = torch.tensor([[1.0, 0.0]] * 4)
    assert float(Importance(1.0)(decision(logits, weights=one))) == pytest.approx(E - 1)
    balanced = torch.cat((torch.eye(E), torch.eye(E)))
    equal = torch.tensor([[1.0, 0.0]] * 8)
    assert float(Importance(1.0)(decision(balanced, weights=equal))) == pytest.approx(0)


def test_schedules():
    line = Ramp(1.0, 3.0, 10, begin=5)
    assert [line(s) for s in (0, 5, 10, 15, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert Ramp(1.0, 0.0, 2, shape="cosine")(1) == pytest.approx(0.5)
    assert Ramp(1.0, 0.01, 2, shape="exponential")(1) == pytest.approx(0.1)
    assert [Ramp(1.0, 2.0, 3, shape="step")(s) for s in (2, 3)] == [1.0, 2.0]
    assert value_at(read({"start": 0, "end": 4, "steps": 4}), 1) == 1.0 and value_at(read(0.5), 9) == 0.5
    weighed = Balance(SITE, {"start": 0.0, "end": 1.0, "steps": 10})
    torch.testing.assert_close(
        weighed(decision(torch.zeros(4, E), step=5)), 0.5 * Balance(SITE, 1.0)(decision(torch.zeros(4, E)))
    )
    for bad in (
        {"start": 1},
        {"start": 0.0, "end": 1.0, "steps": 3, "shape": "exponential"},
        {"start": 0, "end": 1, "steps": 0},
        "x",
    ):
        with pytest.raises(InputError):
            read(bad)
