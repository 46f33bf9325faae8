"""HMoE: the size penalty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Routing
from moestro.layers.banks.widths import widths
from moestro.layers.losses.balance import balance
from moestro.layers.router import Decision
from moestro.layers.routers.hmoe import hmoe
from tests.layers.sites import context, inputs, made, site, with_bank


def heterogeneous(**options):
    base = site(d_expert=16)
    return replace(base, experts=widths(base, **options))


def test_equal_sizes_give_the_balance_loss():
    router = made(hmoe, with_bank(site()), select="top_k", penalty=1.0)
    decision = router.decide(inputs(), context())
    f_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=8) / 24
    torch.testing.assert_close(router.penalties(decision)["size_penalty"], balance(f_E, decision.probs_TE.mean(0)))


def test_equally_used_experts_are_pushed_in_proportion_to_their_sizes():
    at = heterogeneous()
    router = made(hmoe, at, select="top_k")
    probs = torch.full((8, 8), 1 / 8, requires_grad=True)
    even = Routing(torch.stack((torch.arange(8), (torch.arange(8) + 1) % 8), 1), torch.ones(8, 2), probs.log(), probs)
    router.losses["size_penalty"](Decision(inputs(8), context(8), even, even)).backward()
    sizes = torch.tensor([9, 11, 13, 15, 17, 19, 21, 23]) / 16
    torch.testing.assert_close(probs.grad[0] / probs.grad[0].mean(), sizes)


def test_the_total_is_that_of_equal_experts():
    at = heterogeneous()
    assert sum(at.experts.costs) == 8 * 3 * 16 * 16 and len(set(at.experts.costs)) == 8


def test_top_p_takes_experts_up_to_p_and_pays_entropy():
    router = made(hmoe, heterogeneous(), p=0.6)
    routing = router(inputs(), context())
    mass = torch.where(routing.experts_TK < 0, torch.zeros(()), routing.weights_TK)
    count = (routing.experts_TK >= 0).sum(1)
    assert bool((mass.sum(1) > 0.6).all()) and len(count.unique()) > 1
    last = mass.gather(1, count[:, None] - 1)[:, 0]
    assert bool((mass.sum(1) - last <= 0.6).all())
    decision = router.decide(inputs(), context())
    entropy = -(decision.probs_TE * decision.probs_TE.log()).sum(1).mean()
    torch.testing.assert_close(router.penalties(decision)["entropy"], 0.03 * entropy)
    assert list(made(hmoe, heterogeneous(), select="top_k").losses) == ["size_penalty"]


def test_what_cannot_be():
    with pytest.raises(InputError):
        made(hmoe, heterogeneous(), select="threshold")
