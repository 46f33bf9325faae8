"""Task-level experts: one route per task, its limits in tau, and the sparse path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build, rotary_table

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, d_dense=8, init_std=0.3)
TOKENS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
TASK = torch.tensor([0, 1, 1, 3])
GIVEN = {"domain_T": TASK.repeat_interleave(6)}
ROTARY = rotary_table(torch.arange(6).expand(4, 6), 8, 10000.0)


def model(**options):
    return build(replace(CONFIG, architecture={"name": "task_level", "noise": 0.3, **options}))


@pytest.mark.parametrize("mode", ["gumbel", "softmax"])
def test_equal_copies_are_the_dense_model_for_any_route(mode):
    made = model(noise=0.0, mode=mode)
    plain = build(replace(CONFIG, dense_layers=(0, 1)))
    state = {k: v for k, v in made.state_dict().items() if ".copies." not in k and ".route." not in k and ".vectors." not in k}
    state |= {k.replace(".copies.0", ""): v for k, v in made.state_dict().items() if ".copies.0." in k}
    plain.load_state_dict(state)
    out = made(TOKENS, given=GIVEN, rng=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.logits_BTV, plain(TOKENS).logits_BTV)


@pytest.mark.parametrize("training", [True, False])
def test_a_task_has_one_route(training):
    routings = model().train(training)(TOKENS, given=GIVEN, rng=torch.Generator().manual_seed(0)).routings
    for routing in routings:
        ids = routing.experts_TK.view(4, 6)
        assert bool((ids == ids[:, :1]).all()) and int(ids[1, 0]) == int(ids[2, 0])


def test_a_hot_softmax_is_the_mean_of_the_copies_and_a_cold_one_the_best():
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    for tau, expected in ((1e6, "mean"), (1e-6, "best")):
        choice = model(mode="softmax", tau=tau).eval().layers[0]
        ctx = RouteContext(carry=dict(GIVEN))
        y, _ = choice(x, ROTARY, None, ctx)
        each = torch.stack([layer(x, ROTARY, None, ctx)[0] for layer in choice.copies])
        best = choice.weights(ctx)[0].argmax(-1)[TASK]
        wanted = each.mean(0) if expected == "mean" else each[best, torch.arange(4)]
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_the_sparse_path_runs_only_chosen_copies_and_is_the_dense_one_with_one_hot_weights():
    choice = model().layers[0]
    x, rng = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0)), torch.Generator()
    ran = []
    for j, layer in enumerate(choice.copies):
        layer.register_forward_hook(lambda m, args, out, j=j: ran.append((j, len(args[0]))))
    dense, out = choice(x, ROTARY, None, RouteContext(training=True, rng=rng.manual_seed(3), carry=dict(GIVEN)))
    assert ran == [(0, 4), (1, 4), (2, 4)]
    ran.clear()
    with torch.no_grad():
        for parameter in choice.route.parameters():
            parameter.requires_grad_(False)
        choice.vectors.requires_grad_(False)
        sparse, again = choice(x, ROTARY, None, RouteContext(training=True, rng=rng.manual_seed(3), carry=dict(GIVEN)))
    assert torch.equal(again.routings[0].experts_TK, out.routings[0].experts_TK) and sum(n for _, n in ran) == 4
    torch.testing.assert_close(sparse, dense.detach())


def test_routes_and_task_vectors_learn_from_the_task_loss():
    made = model()
    made(TOKENS, given=GIVEN, rng=torch.Generator().manual_seed(0)).logits_BTV.square().sum().backward()
    grad = made.layers[0].vectors.weight.grad.abs().sum(1)
    assert bool((grad[[0, 1, 3]] > 0).all()) and float(grad[2]) == 0.0
    assert all(float(layer.route[0].weight.grad.abs().sum()) > 0 for layer in made.layers)


def test_refused():
    for options in ({"copies": 0}, {"mode": "hard"}, {"noise": -1.0}):
        with pytest.raises(InputError):
            model(**options)
    with pytest.raises(InputError, match="task 7"):
        model()(TOKENS, given={"domain_T": torch.full((24,), 7)})
