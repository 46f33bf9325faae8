"""Micro- against global-batch balance: gradients of parts, equal parts, and the router that only the global form allows."""

from __future__ import annotations

import torch

from moestro.core.routing import Routing
from moestro.layers.losses.balance import balance, balance_loss
from moestro.layers.losses.global_balance import global_balance
from moestro.layers.router import Decision
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, inputs, made, site


def decided(router, x, step=0):
    return router.decide(x, context(len(x), step=step))


def counts(decision):
    return torch.bincount(decision.chosen.experts_TK.reshape(-1), minlength=8).float()


def test_mean_gradient_of_synchronised_parts_is_that_of_one_batch():
    router, x = made(topk), inputs(96)
    weight = router.score.gate.weight
    parts = [decided(router, piece) for piece in x.chunk(4)]
    f = sum(counts(part) for part in parts)
    synchronised = sum(balance(f / f.sum(), part.probs_TE.mean(0)) for part in parts) / 4
    whole = balance_loss(site(), weight=1.0)(decided(router, x))
    torch.testing.assert_close(synchronised, whole)
    a, b = (torch.autograd.grad(loss, weight)[0] for loss in (synchronised, whole))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    micro = sum(balance_loss(site(), weight=1.0)(decided(router, piece)) for piece in x.chunk(4)) / 4
    assert not torch.allclose(torch.autograd.grad(micro, weight)[0], b, rtol=1e-3), "the micro form is another loss"


def test_counts_gather_over_a_step_and_start_afresh_with_the_next():
    router, loss = made(topk), global_balance(site(), weight=1.0)
    pieces = [inputs(24, seed=s) for s in range(3)]
    f = torch.zeros(8)
    for x in pieces:
        decision = decided(router, x, step=4)
        f += counts(decision)
        torch.testing.assert_close(loss(decision), balance(f / f.sum(), decision.probs_TE.mean(0)))
    fresh = decided(router, pieces[0], step=5)
    torch.testing.assert_close(loss(fresh), balance(counts(fresh) / 48, fresh.probs_TE.mean(0)))


def test_equal_parts_make_the_forms_equal():
    router, whole, part = made(topk), global_balance(site()), balance_loss(site())
    for _ in range(3):
        decision = decided(router, inputs())
        torch.testing.assert_close(whole(decision), part(decision))


def one_domain(experts):
    """Tokens of a domain, spread evenly over its two experts, with sure probabilities."""
    ids = torch.tensor(experts).repeat(6)[:, None]
    probs = torch.full((12, 8), 1e-9).scatter(1, ids, 1.0)
    routing = Routing(ids, torch.ones(12, 1), probs.log(), probs)
    return Decision(inputs(12), context(12), routing, routing)


def test_a_specialised_and_globally_even_router_costs_1_globally_and_4_locally():
    domains = [one_domain(pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))]
    whole, part = global_balance(site(), weight=1.0), balance_loss(site(), weight=1.0)
    for domain in domains:
        last = whole(domain)
        torch.testing.assert_close(part(domain), torch.tensor(4.0))
    torch.testing.assert_close(last, torch.tensor(1.0))


def test_a_local_share_is_added():
    router = made(topk)
    decision = decided(router, inputs())
    plain, mixed = global_balance(site()), global_balance(site(), local=0.25)
    torch.testing.assert_close(mixed(decision), 1.25 * plain(decision))
