"""MoGE: equal group loads for every token, raw scaled weights, the deployment form."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.routers.moge import moge
from moestro.layers.routers.topk import topk
from tests.layers.sites import chosen, context, dense, inputs, made, site


@pytest.mark.parametrize(("groups", "top_k"), [(2, 2), (4, 4), (2, 6), (1, 3)])
def test_every_group_gives_the_same_number(groups, top_k):
    routing = made(moge, site(top_k=top_k), groups=groups)(inputs(), context())
    loads_TG = chosen(routing).unflatten(1, (groups, -1)).sum(-1)
    assert bool((loads_TG == top_k // groups).all()), "for every token, hence for every batch: imbalance 0"
    probs = routing.probs_TE.detach().unflatten(1, (groups, -1))
    kept = chosen(routing).unflatten(1, (groups, -1))
    worst, best_left = torch.where(kept, probs, 9.0).min(-1).values, torch.where(kept, -9.0, probs).max(-1).values
    assert bool((worst >= best_left).all()), "the best of each group by the probability over all experts"


def test_plain_top_k_is_not_balanced_on_the_same_scores():
    x, where = inputs(64), site(top_k=4)
    group_loads = [
        chosen(made(f, where, **o)(x, context(64))).sum(0).unflatten(0, (4, 2)).sum(-1)
        for f, o in ((moge, {"groups": 4}), (topk, {}))
    ]
    assert group_loads[0].tolist() == [64] * 4 and int(group_loads[1].max() - group_loads[1].min()) > 0


def test_one_group_is_plain_top_k():
    x, a, b = inputs(), made(moge, groups=1), made(topk, combine="raw")
    torch.testing.assert_close(dense(a(x, context())), dense(b(x, context())))
    torch.testing.assert_close(a.penalties(a.decide(x, context()))["balance"], b.penalties(b.decide(x, context()))["balance"])


def test_the_scale_weighs_and_does_not_choose():
    x, router = inputs(), made(moge)
    before = router(x, context())
    with torch.no_grad():
        router.combine.scale_E.copy_(torch.arange(8.0))
    after = router(x, context())
    assert torch.equal(before.experts_TK, after.experts_TK)
    torch.testing.assert_close(dense(after), dense(before) * torch.arange(8.0))


def test_voting_keeps_the_most_chosen_of_each_group_in_evaluation_only():
    x, router = inputs(), made(moge, voted=2)
    free, voted = router(x, context()), router(x, context(training=False))
    votes = chosen(free).sum(0).view(2, 4)
    used = chosen(voted).any(0).view(2, 4)
    assert used.sum(1).tolist() == [2, 2] and chosen(free).any(0).sum() > 4
    for g in range(2):
        assert votes[g][used[g]].min() >= votes[g][~used[g]].max()


@pytest.mark.parametrize("options", [{"groups": 3}, {"groups": 8}, {"voted": 5}])
def test_what_does_not_divide_is_refused(options):
    with pytest.raises(InputError):
        made(moge, **options)
