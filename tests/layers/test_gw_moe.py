"""GW-MoE: unsure tokens go to all experts, in training only."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.routers.gw_moe import gw_moe
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, dense, inputs, made, with_bank
from tests.layers.sites import site as at


def broadcast(routing):
    return (routing.experts_TK >= 0).sum(1) == 8


@pytest.mark.parametrize("combine", ["renormalised", "raw"])
@pytest.mark.parametrize(("training", "threshold"), [(True, 1.01), (False, 0.0)])
def test_the_host_in_evaluation_and_beyond_the_largest_entropy(training, threshold, combine):
    ours = made(gw_moe, threshold=threshold, combine=combine)
    host = made(topk, combine=combine)
    a, b = ours.decide(inputs(), context(training=training)), host.decide(inputs(), context(training=training))
    assert torch.equal(a.routing.experts_TK, b.routing.experts_TK) and torch.equal(a.routing.weights_TK, b.routing.weights_TK)
    assert torch.equal(ours.penalties(a)["balance"], host.penalties(b)["balance"])


def test_threshold_0_without_a_limit_is_the_dense_mixture():
    where = with_bank(at())
    router = made(gw_moe, where, threshold=0.0, slots=0)
    routing = router(inputs(), context())
    expected = sum(routing.probs_TE[:, e : e + 1] * where.experts.output(inputs(), e) for e in range(8))
    torch.testing.assert_close(where.experts.run(inputs(), routing), expected)


def test_tokens_above_the_threshold_and_no_others():
    router = made(gw_moe, threshold=0.6, slots=0)
    routing = router(inputs(), context())
    entropy = -(routing.probs_TE * (routing.probs_TE + 1e-5).log()).sum(1)
    unsure = entropy >= 0.6 * math.log(8)
    assert torch.equal(broadcast(routing), unsure) and 0 < int(unsure.sum()) < 24
    host = made(topk)(inputs(), context())
    torch.testing.assert_close(dense(routing)[~unsure], dense(host)[~unsure])
    torch.testing.assert_close(dense(routing)[unsure], routing.probs_TE[unsure].detach())


def test_the_first_slots_of_each_sequence():
    free, limited = (broadcast(made(gw_moe, at(init_std=0.25), threshold=0.75, slots=n)(inputs(), context())) for n in (0, 3))
    for row in range(3):
        places = free.view(3, 8)[row].nonzero().flatten()
        assert limited.view(3, 8)[row].nonzero().flatten().tolist() == places[:3].tolist()
    assert int(free.sum()) > int(limited.sum()) > 0


def test_a_schedule_lets_broadcasting_begin_later():
    router = made(gw_moe, threshold={"start": 2.0, "end": 0.0, "steps": 10, "shape": "step"}, slots=0)
    assert not bool(broadcast(router(inputs(), context(step=9))).any())
    assert bool(broadcast(router(inputs(), context(step=10))).all())


def test_what_cannot_be():
    with pytest.raises(InputError):
        made(gw_moe, slots=-1)
