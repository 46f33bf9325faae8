"""Top-p routing: the nucleus, its two ends, its losses."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.routers.switch import switch
from moestro.layers.routers.top_p import top_p
from tests.layers.sites import chosen, context, dense, inputs, made


@pytest.mark.parametrize("p", [0.3, 0.4, 0.8])
def test_the_fewest_experts_that_exceed_p(p):
    routing = made(top_p, p=p)(inputs(), context())
    weights, filled = routing.weights_TK.detach(), routing.experts_TK >= 0
    last = torch.where(filled, weights, 9.0).min(1).values
    mass = weights.sum(1)
    assert bool((filled.sum(1) >= 1).all()) and len(set(filled.sum(1).tolist())) > 1
    assert bool((mass > p).all()) and bool((mass - last <= p + 1e-6).all())
    ranked = routing.probs_TE.detach().sort(-1, descending=True).values
    torch.testing.assert_close(weights, torch.where(filled, ranked[:, : weights.shape[1]], 0.0))


def test_p_1_is_the_dense_mixture():
    routing = made(top_p, p=1.0)(inputs(), context())
    assert bool(chosen(routing).all())
    torch.testing.assert_close(dense(routing), routing.probs_TE.detach())


def test_p_0_is_switch():
    x = inputs()
    a, b = made(top_p, p=0.0)(x, context()), made(switch, capacity=0.0)(x, context())
    assert torch.equal(dense(a), dense(b))


def test_losses_written_out():
    router = made(top_p, balance=0.01, entropy=0.1)
    decision = router.decide(inputs(), context())
    f, p = chosen(decision.routing).float().mean(0), decision.probs_TE
    losses = router.penalties(decision)
    assert float(f.sum()) > 1, "f sums to the mean number of experts"
    torch.testing.assert_close(losses["balance"], 0.01 * 8 * (f * p.mean(0)).sum())
    torch.testing.assert_close(losses["entropy"], 0.1 * -(p * p.log()).sum(1).mean())


def test_p_may_follow_a_schedule():
    router = made(top_p, p={"start": 1.0, "end": 0.0, "steps": 10})
    used = [float(chosen(router(inputs(), context(step=step))).float().sum(1).mean()) for step in (0, 5, 10)]
    assert used[0] == 8 and used[0] > used[1] > used[2] == 1


@pytest.mark.parametrize("p", [-0.1, 1.5, {"start": 0.5, "end": 2.0, "steps": 3}])
def test_a_share_outside_0_to_1_is_refused(p):
    with pytest.raises(InputError):
        made(top_p, p=p)
