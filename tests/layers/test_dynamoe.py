"""DynaMoE: the threshold and its running percentile, budgets over depth."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.block import Output
from moestro.layers.routers.dynamoe import dynamoe, percentile_of
from moestro.layers.schedule.depth import DEPTH, budgets
from tests.layers.sites import chosen, context, inputs, made, site


@pytest.mark.parametrize("layer", range(4))
def test_between_one_and_the_budget(layer):
    router = made(dynamoe, site(layer=layer, layers=4, top_k=4), least=1, most=7, percentile=40.0)
    count = chosen(router(inputs(256), context(256))).sum(1)
    assert router.select.most == (7, 5, 3, 1)[layer]
    assert int(count.min()) >= 1 and int(count.max()) == router.select.most
    assert layer == 3 or float(count.float().var()) > 0, "tokens differ"


def test_what_is_chosen_is_above_the_threshold():
    router = made(dynamoe, most=8, schedule="uniform", least=8)
    routing = router(inputs(), context())
    logits, mask = routing.logits_TE.detach(), chosen(routing)
    best = torch.zeros_like(mask).scatter_(1, logits.argmax(1, keepdim=True), True)
    assert torch.equal(mask, (logits >= 0) | best)
    inside = logits.masked_fill(~mask, -torch.inf).softmax(1)
    torch.testing.assert_close(routing.weights_TK.detach().sum(1), torch.ones(24))
    torch.testing.assert_close(
        inside.gather(1, routing.experts_TK.clamp_min(0))[mask.any(1)][:, 0], routing.weights_TK[:, 0].detach()
    )


def test_a_tokens_own_percentile_is_top_k_in_disguise():
    counts = chosen(made(dynamoe, site(top_k=4), percentile_of="token")(inputs(64), context(64))).sum(1)
    assert counts.unique().tolist() == [4]


def trained(router, batches):
    for step, x in enumerate(batches):
        routing = router(x, context(len(x), step=step))
        router.select.after_step([Output(x, {}, (routing,))], step)


def test_theta_follows_the_percentile_of_all_logits():
    router, batches = made(dynamoe, percentile=70.0), [inputs(64, seed=s) for s in range(4)]
    trained(router, batches)
    expected = torch.stack([percentile_of(x @ router.score.gate.weight.detach().t(), 70.0) for x in batches]).mean()
    torch.testing.assert_close(router.select.theta, expected)
    logits = inputs(2000, seed=50) @ router.score.gate.weight.detach().t()
    assert abs(float((logits < router.select.theta).float().mean()) - 0.7) < 0.05
    before = router.select.theta.clone()
    router(inputs(seed=9), context(training=False))
    router.select.after_step([], 5)
    assert torch.equal(router.select.theta, before), "evaluation moves nothing"


def test_percentile_of_counts():
    values = torch.arange(10.0).view(2, 5)
    assert [float(percentile_of(values, p)) for p in (0, 50, 95, 100)] == [0, 5, 9, 9]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("uniform", (4, 4, 4, 4, 4)),
        ("descending", (7, 6, 4, 3, 1)),
        ("ascending", (1, 3, 4, 6, 7)),
        ("pyramid-up", (1, 4, 7, 4, 1)),
        ("pyramid-down", (7, 4, 1, 4, 7)),
        ("wave", (4, 7, 4, 1, 4)),
    ],
)
def test_the_six_schedules(schedule, expected):
    assert budgets(schedule, 5, 1, 7) == expected


@pytest.mark.parametrize("schedule", DEPTH)
@pytest.mark.parametrize("total", [6, 13, 24, 48])
def test_schedules_share_a_total(schedule, total):
    found = budgets(schedule, 6, 1, 7, ceiling=8, total=total)
    assert sum(found) == total and min(found) >= 1 and max(found) <= 8


def test_one_layer_and_bad_numbers():
    assert budgets("descending", 1, 1, 5) == (5,)
    for bad in (("spiral", 3, 1, 2), ("uniform", 3, 0, 2), ("uniform", 3, 3, 2)):
        with pytest.raises(InputError):
            budgets(*bad)
    for options in ({"total": 99}, {"most": 9}, {"percentile": 120.0}, {"percentile_of": "batch"}):
        with pytest.raises(InputError):
            made(dynamoe, **options)
