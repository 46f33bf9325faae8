"""AdaMoE: null experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Tap
from moestro.layers.banks.zero import zero
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.experts import Joined
from moestro.layers.routers.adamoe import adamoe
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, dense, inputs, made, site, with_bank

N, M = 8, 4


def where(top_k=4):
    true = with_bank(site(top_k=top_k))
    return replace(true, num_experts=N + M, experts=Joined([true.experts, zero(true, count=M)]))


def test_masked_nulls_leave_plain_top_k_renormalised():
    router = made(adamoe, where(2))
    masked = router.tapped(Tap("logits", lambda z, ctx: torch.cat((z[:, :N], torch.full((len(z), M), float("-inf"))), 1)))
    plain = made(topk, site())
    with torch.no_grad():
        plain.score.gate.weight.copy_(router.score.gate.weight[:N])
    a, b = masked(inputs(), context()), plain(inputs(), context())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_true_weights_sum_to_1_or_nothing_is_added():
    at = where()
    routing = made(adamoe, at)(inputs(400), context(400))
    true = (routing.experts_TK < N).any(1)
    assert bool(true.any()) and not bool(true.all()), "both cases are there"
    torch.testing.assert_close(routing.weights_TK.sum(1), true.float())
    assert bool((routing.weights_TK[routing.experts_TK >= N] == 0).all())
    y = at.experts.run(inputs(400), routing)
    assert bool((y[~true] == 0).all()) and bool((y[true].abs().sum(1) > 0).all())


def test_renaming_nulls_changes_nothing():
    router = made(adamoe, where())
    order = torch.tensor([*range(N), 9, 11, 8, 10])
    renamed = router.tapped(Tap("logits", lambda z, ctx: z[:, order]))
    a, b = router.decide(inputs(), context()), renamed.decide(inputs(), context())
    torch.testing.assert_close(dense(a.routing, N + M)[:, :N], dense(b.routing, N + M)[:, :N])
    torch.testing.assert_close(router.penalties(a)["balance"], renamed.penalties(b)["balance"])


def test_the_loss_by_hand():
    router = made(adamoe, where(), balance=0.5)
    decision = router.decide(inputs(), context())
    f_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=N + M) / (24 * 4)
    p_E = decision.probs_TE.mean(0)
    expected = (N + M) * ((f_E[:N] * p_E[:N]).sum() + f_E[N:].mean() * p_E[N:].sum())
    torch.testing.assert_close(router.penalties(decision)["balance"], 0.5 * expected)


def test_one_null_that_takes_all_slots_of_nulls_is_not_charged_more():
    """Nulls need not be even among each other."""
    uneven = made(adamoe, where()).tapped(Tap("choice", lambda s, ctx: s.index_fill(1, torch.tensor([9, 10, 11]), float("-inf"))))
    decision = uneven.decide(inputs(), context())
    decision.probs_TE.retain_grad()
    uneven.penalties(decision)["balance"].backward()
    nulls = decision.probs_TE.grad[0, N:]
    assert float(nulls.min()) == float(nulls.max()) > 0


def test_in_a_model_nulls_cost_nothing_and_tokens_differ():
    config = MoEConfig(
        vocabulary=32, d_model=16, layers=1, heads=2, num_experts=8, d_expert=8, top_k=4, router="adamoe",
        special=({"name": "zero", "count": 8},), init_std=0.5,
    )  # fmt: skip
    model = build(config)
    routing = model(torch.randint(0, 32, (4, 16), generator=torch.Generator().manual_seed(0))).routings[0]
    true = (routing.experts_TK < 8).sum(1).float()
    assert float(true.std()) > 0 and 1 < float(true.mean()) < 3  # 4 slots x 8 of 16 experts = 2
    assert model.layers[0].block.experts.costs[8:] == (0,) * 8


def test_more_slots_than_experts():
    with pytest.raises(InputError):
        made(adamoe, where(13))
