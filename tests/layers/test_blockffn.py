"""BlockFFN: the gate, and its two losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.core.routing import RouteContext, Routing
from moestro.layers.experts import Stacked
from moestro.layers.losses.chunk_sparsity import chunk_sparsity, chunks_of
from moestro.layers.losses.locality import locality
from moestro.layers.router import Decision
from moestro.layers.routers.blockffn import blockffn
from tests.layers.sites import chosen, context, dense, inputs, made, site


def decision(logits, probs=None, ctx=None):
    probs = logits.relu() if probs is None else probs
    routing = Routing(torch.zeros(len(logits), 1, dtype=torch.int64), torch.ones(len(logits), 1), logits, probs)
    return Decision(inputs(len(logits)), ctx or context(len(logits)), routing, routing)


def test_scores_do_not_depend_on_the_inputs_length():
    router = made(blockffn, eps=1e-12)
    a, b = router(inputs(), context()), router(7.5 * inputs(), context())
    torch.testing.assert_close(dense(a), dense(b))


def test_the_support_is_that_of_relu_and_the_norm_is_written_out():
    router = made(blockffn)
    with torch.no_grad():
        router.combine.scale_E.uniform_(0.5, 2.0)
    routing = router(inputs(), context())
    a_TE = routing.logits_TE.relu()
    assert torch.equal(chosen(routing), a_TE > 0) and len((a_TE > 0).sum(1).unique()) > 2
    n_TE = a_TE / (a_TE.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(dense(routing), (n_TE * router.combine.scale_E).detach())


def test_sparse_experts_equal_one_wide_network():
    torch.manual_seed(0)
    bank = Stacked(8, ExpertSpec(16, 6, "silu", False), std=0.3)
    routing = made(blockffn, replace(site(), experts=bank))(inputs(), context())
    hidden = torch.nn.functional.silu(inputs() @ bank.gate_up_EFD.flatten(0, 1).t())
    blocks = dense(routing).repeat_interleave(6, 1)
    wide = (hidden * blocks) @ bank.down_EDF.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(bank.run(inputs(), routing), wide, rtol=1e-4, atol=1e-5)


def test_no_expert_is_legal():
    router = made(blockffn)
    with torch.no_grad():
        router.score.gate.weight.copy_(router.score.gate.weight.abs())
    d = router.decide(-torch.ones(6, 16), context(6))
    assert bool((d.routing.experts_TK < 0).all()) and all(bool(loss.isfinite()) for loss in router.penalties(d).values())


def test_chunks_stay_inside_sequences():
    chunk_T, number = chunks_of(context(20, length=8), 20, 3)
    assert chunk_T.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7] and number == 8
    assert chunks_of(RouteContext(), 5, 4)[0].tolist() == [0, 0, 0, 0, 1]


def test_chunk_loss_of_single_tokens_is_the_mean_score():
    logits = inputs(24, 8)
    found = chunk_sparsity(site(), weight=1.0, length=1)(decision(logits))
    p_TE = logits.relu() / (logits.relu().sum(1, keepdim=True) + 1e-5)
    torch.testing.assert_close(found, p_TE.mean() - 1e-5)


def test_chunk_loss_written_out():
    logits = inputs(24, 8)
    found = chunk_sparsity(site(layers=2), weight=3.0, length=4)(decision(logits))
    p_TE = logits.relu() / (logits.relu().sum(1, keepdim=True) + 1e-5)
    unused = (1 - p_TE + 1e-5).view(6, 4, 8).prod(1)
    torch.testing.assert_close(found, 3.0 / 2 * (1 - unused.mean()))


def test_chunk_loss_of_sure_tokens_is_the_share_of_experts_in_use():
    alike = torch.eye(8)[torch.arange(24) // 8]  # one expert per chunk of 8
    apart = torch.eye(8)[torch.arange(24) % 8]  # all
    loss = chunk_sparsity(site(), weight=1.0, length=8)
    assert float(loss(decision(alike))) == pytest.approx(1 / 8, abs=1e-3)
    assert float(loss(decision(apart))) == pytest.approx(1.0, abs=1e-3)
    logits = alike.clone().requires_grad_()
    loss(decision(logits + 0.1)).backward()
    assert float(logits.grad.abs().sum()) > 0


def test_locality_of_equal_and_of_opposite_neighbours():
    loss = locality(site(), weight=1.0, sharpness=100.0)
    signs = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)
    assert float(loss(decision(signs.expand(8, 8), ctx=context(8)))) == pytest.approx(0, abs=1e-6)
    flips = signs * torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0)[:, None]
    assert float(loss(decision(flips, ctx=context(8)))) == pytest.approx(100.0)
    assert float(loss(decision(torch.zeros(8, 8), ctx=context(8)))) == pytest.approx(math.log(2))


def test_sequences_are_no_neighbours():
    loss = locality(site(), weight=1.0)
    rows = torch.where(torch.arange(24)[:, None] // 8 == 1, -1.0, 1.0).expand(24, 8)
    assert float(loss(decision(rows))) == pytest.approx(0, abs=1e-6)
    assert float(loss(decision(rows[:8], ctx=RouteContext(training=True)))) == pytest.approx(0, abs=1e-6)
    assert float(loss(decision(rows[:1], ctx=context(1)))) == 0


def test_each_loss_does_what_it_is_for():
    """On sequences of similar tokens: unused experts of a token and of a chunk, and the overlap of neighbours."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(16, 1, 16, generator=g) + 0.7 * torch.randn(16, 8, 16, generator=g)).flatten(0, 1)

    def after(chunk, near):
        router = made(blockffn, chunk_sparsity=chunk, locality=near, chunk=8)
        optimiser = torch.optim.Adam(router.parameters(), lr=0.02)
        for _ in range(60):
            optimiser.zero_grad()
            sum(router.penalties(router.decide(x, context(128))).values()).backward()
            optimiser.step()
        used = chosen(router(x, context(128))).view(16, 8, 8)
        overlap = (used[:, 1:] & used[:, :-1]).sum() / (used[:, 1:] | used[:, :-1]).sum()
        return float((~used).float().mean()), float((~used.any(1)).float().mean()), float(overlap)

    token, together, overlap = after(0.0, 0.0)
    assert after(1.0, 0.0)[0] > token + 0.15 and after(1.0, 0.0)[1] > together + 0.1
    assert after(0.0, 0.1)[2] > overlap + 0.1


def test_what_cannot_be():
    with pytest.raises(InputError):
        made(blockffn, chunk=0)
