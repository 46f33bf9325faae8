"""Expert Choice: equal loads, the capped plan, the leak in training and the causal form of evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from moestro.core.errors import InputError
from moestro.layers.block import Output
from moestro.layers.routers.expert_choice import capped_plan, expert_choice
from tests.layers.sites import chosen, context, dense, inputs, made


@pytest.mark.parametrize(("capacity", "tokens"), [(2.0, 24), (1.0, 24), (2.0, 20)])
def test_every_expert_has_b_tokens(capacity, tokens):
    routing = made(expert_choice, capacity=capacity)(inputs(tokens), context(tokens))
    assert chosen(routing).sum(0).tolist() == [round(tokens * capacity / 8)] * 8
    taken = chosen(routing).sum(1)
    assert len(set(taken.tolist())) > 2, "tokens differ in how many experts they have"


def test_experts_take_their_best_tokens_with_raw_weights():
    routing = made(expert_choice)(inputs(), context())
    probs, mask = routing.probs_TE.detach(), chosen(routing)
    torch.testing.assert_close(dense(routing), torch.where(mask, probs, 0.0))
    assert bool((torch.where(mask, probs, 9.0).min(0).values >= torch.where(mask, -9.0, probs).max(0).values).all())


def test_permuting_tokens_permutes_the_routing():
    x, order = inputs(), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    router = made(expert_choice)
    torch.testing.assert_close(dense(router(x[order], context())), dense(router(x, context()))[order])


def test_capacity_e_is_the_dense_mixture():
    routing = made(expert_choice, capacity=8.0)(inputs(), context())
    torch.testing.assert_close(dense(routing), routing.probs_TE.detach())


def changed_later(router, training):
    """The first sequence's routing before and after all other sequences and its own last tokens changed."""
    a, b = inputs(), inputs()
    b[5:] = 4 * inputs(seed=1)[5:]
    return [dense(router(x, context(training=training)))[:5] for x in (a, b)]


def test_later_tokens_leak_in_training_and_not_in_evaluation():
    router = made(expert_choice)
    assert not torch.equal(*changed_later(router, True))
    for _ in range(3):
        assert torch.equal(*changed_later(router, False))
        train(router, 1)


def train(router, steps, decay_inputs=0):
    for step in range(steps):
        routing = router(inputs(256, seed=decay_inputs + step), context(256, step=step))
        router.select.after_step([Output(routing.weights_TK, {}, (routing,))], step)


def test_thresholds_give_about_the_capacity_on_new_tokens():
    router = made(expert_choice)
    train(router, 20)
    routing = router(inputs(2000, seed=99), context(2000, training=False))
    assert abs(float(chosen(routing).float().sum(1).mean()) - 2.0) < 0.25
    load = chosen(routing).float().mean(0) * 8 / 2
    assert float(load.max()) < 1.35
    one = router(inputs(2000, seed=99)[7:8], context(1, training=False))
    torch.testing.assert_close(dense(one), dense(routing)[7:8])


def test_the_threshold_is_the_mean_of_the_smallest_taken():
    router, least = made(expert_choice, decay=0.99), []
    for step in range(3):
        routing = router(inputs(64, seed=step), context(64))
        least.append(torch.where(chosen(routing), dense(routing), 9.0).min(0).values)
        router.select.after_step([Output(routing.weights_TK, {}, (routing,))], step)
    torch.testing.assert_close(router.select.threshold_E, torch.stack(least).mean(0))


def test_untrained_or_asked_for_the_best_c():
    for router in (made(expert_choice), made(expert_choice, inference="topk")):
        if router.select.inference == "topk":
            train(router, 2)
        routing = router(inputs(), context(training=False))
        assert torch.equal(routing.experts_TK, routing.probs_TE.topk(2, -1).indices)


@pytest.mark.parametrize("most", [2, 3])
def test_no_token_has_more_than_the_cap(most):
    plain, router = made(expert_choice), made(expert_choice, most=most)
    x = inputs(64)
    taken, load = (chosen(router(x, context(64))).sum(i) for i in (1, 0))
    assert int(taken.max()) == most < int(chosen(plain(x, context(64))).sum(1).max())
    assert int(load.max()) == 16 and int(load.sum()) >= 0.98 * 128, "the experts are as full as can be"


def test_the_plan_is_the_best_one_within_its_bounds():
    """Against the linear program without entropy."""
    scores = inputs(12, 4, seed=5).softmax(-1)
    b, most = 6, 2
    plan = capped_plan(scores, b, most, 0.01, 3000).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 6.0, dtype=torch.float64), atol=1e-2, rtol=0)
    assert float(plan.sum(1).max()) < most + 1e-2 and float(plan.max()) <= 1 + 1e-9
    rows = np.kron(np.eye(12), np.ones(4))
    columns = np.kron(np.ones(12), np.eye(4))
    best = linprog(-scores.double().numpy().ravel(), rows, [most] * 12, columns, [b] * 4, bounds=(0, 1))
    assert abs(float((plan * scores).sum()) + best.fun) < 0.02 * -best.fun


@pytest.mark.parametrize(
    "options", [{"capacity": 9.0}, {"capacity": 0.0}, {"most": 1}, {"inference": "oracle"}, {"temperature": 0.0}, {"decay": 1.0}]
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(InputError):
        made(expert_choice, **options)
