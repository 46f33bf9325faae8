"""Hecto: one expert of two runs, and kinds of samples find their kind of expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext
from moestro.layers.architectures.hecto import STATIC, TEMPORAL, Pair
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build

CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=1, heads=2, d_expert=8, architecture={"name": "hecto", "hidden": 12}, init_std=0.3
)
TOKENS = torch.randint(0, 32, (6, 8), generator=torch.Generator().manual_seed(0))


def last(**options):
    return replace(CONFIG, architecture={"name": "hecto", "hidden": 12, "read": "last", **options})


def pair(model) -> Pair:
    return model.layers[-1]


def test_only_the_chosen_expert_runs_on_a_sample():
    model, seen = build(last()).eval(), {}
    pair(model).static.register_forward_hook(lambda m, args, out: seen.update(static=len(args[0])))
    pair(model).temporal.register_forward_hook(lambda m, args, out: seen.update(temporal=len(args[0])))
    out = model(TOKENS)
    choice = out.routings[0].experts_TK[:, 0]
    assert out.logits_BTV.shape == (6, 1, 32) and 0 < int(choice.sum()) < 6
    assert seen == {"static": int((choice == STATIC).sum()), "temporal": int((choice == TEMPORAL).sum())}


@pytest.mark.parametrize("only", [STATIC, TEMPORAL])
def test_the_other_expert_gets_no_gradient_and_the_gate_does(only):
    model = build(last(sure=0.0, even=0.0))
    with torch.no_grad():
        pair(model).gate.weight.zero_()[only] = 1.0
        pair(model).norm.weight.fill_(1.0)
    model.layers[0].register_forward_hook(lambda m, args, out: (out[0].abs(), out[1]))  # then the gate's logit is positive
    out = model(TOKENS)
    out.logits_BTV.square().sum().backward()
    used, idle = (pair(model).static[0].weight, pair(model).temporal.weight_ih_l0)[:: 1 if only == STATIC else -1]
    assert idle.grad is None and float(used.grad.abs().sum()) > 0 and float(pair(model).gate.weight.grad.abs().sum()) > 0


def test_the_last_position_decides_as_it_does_among_all():
    model = build(CONFIG).eval()
    other = build(last()).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(TOKENS).logits_BTV[:, -1:], other(TOKENS).logits_BTV)


def test_losses_are_the_rule():
    out = build(last(sure=2.0, even=3.0))(TOKENS)
    p = out.routings[0].probs_TE
    torch.testing.assert_close(out.losses["sure"], 2.0 * -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(out.losses["even"], 3.0 * (p.mean(0) - 0.5).square().sum())


def test_order_and_bag_samples_go_apart():
    """Half of the samples ask which mark came first (order), half whether there are more of one (a bag in the last state)."""
    torch.manual_seed(0)
    config = replace(CONFIG, architecture="decoder")
    expert = Pair(config, 24, 1.0, 0.0, 1.0, True)
    optimiser = torch.optim.Adam(expert.parameters(), 0.02)
    head = torch.nn.Linear(16, 2)
    optimiser.add_param_group({"params": head.parameters()})

    def samples(count, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 6, 16, generator=g) * 0.3
        order = torch.arange(count) % 2 == 0
        sign = torch.randint(0, 2, (count,), generator=g) * 2.0 - 1
        x[:, :, :4] = 0
        x[order, 0, 0] = 3 * sign[order]  # seen in the first state only
        x[~order, -1, 1] = 3 * sign[~order]
        x[:, -1, 2] = torch.where(order, 2.0, -2.0)
        return x, order, (sign > 0).long()

    for step in range(150):
        x, order, label = samples(64, step)
        y, out = expert(x, (x, x), None, RouteContext(training=True))
        loss = torch.nn.functional.cross_entropy(head(y[:, 0]), label) + sum(out.losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, order, label = samples(200, 999)
    with torch.no_grad():
        y, out = expert(x, (x, x), None, RouteContext())
    temporal = out.routings[0].experts_TK[:, 0] == TEMPORAL
    assert float((temporal == order).float().mean()) > 0.9 and float((head(y[:, 0]).argmax(1) == label).float().mean()) > 0.95


@pytest.mark.parametrize("options", [{"read": "first"}, {"tau": 0.0}])
def test_refused(options):
    with pytest.raises(InputError):
        build(last(**options))
