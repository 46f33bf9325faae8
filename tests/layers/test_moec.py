"""MoEC: survivors of each cluster, the cluster loss, the gate."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Routing
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.router import Decision
from moestro.layers.routers.moec import Clustering, moec, variances
from tests.layers.sites import chosen, context, inputs, made, site


def survivors(router):
    return next(tap.fn for tap in router.taps if tap.point == "choice")


def test_dropped_experts_get_no_token_and_no_gradient():
    config = MoEConfig(
        vocabulary=32, d_model=16, layers=1, heads=2, num_experts=8, d_expert=8, router={"name": "moec", "clusters": 2}
    )
    model = build(config)
    tokens = torch.randint(0, 32, (8, 8), generator=torch.Generator().manual_seed(0))
    out = model(tokens)
    (out.logits_BTV.square().sum() + sum(out.losses.values())).backward()
    block = model.layers[0].block
    alive = survivors(block.router).alive_E
    load = chosen(out.routings[0]).sum(0)
    assert alive.view(2, 4).sum(1).tolist() == [2, 2]
    assert bool((load[~alive] == 0).all()) and int(load.sum()) > 0
    assert bool((block.experts.gate_up_EFD.grad[~alive] == 0).all())


def test_all_experts_are_routed_to_in_evaluation():
    routing = made(moec)(inputs(512), context(512, training=False))
    assert bool(chosen(routing).any(0).all())
    assert torch.equal(routing.experts_TK[:, 0], routing.probs_TE.argmax(1))


def test_survivors_change_at_intervals_alike_on_every_rank():
    a, b = (survivors(made(moec, weights=w, interval=3)) for w in (0, 1))
    assert torch.equal(a.alive_E, b.alive_E)
    seen = []
    for step in range(60):
        before = a.alive_E.clone()
        for tap in (a, b):
            tap.after_step([], step)
        assert torch.equal(a.alive_E, b.alive_E) and bool(a.alive_E.view(4, 2).any(1).all())
        assert (step + 1) % 3 == 0 or torch.equal(a.alive_E, before)
        seen.append(a.alive_E.clone())
    assert bool(torch.stack(seen).any(0).all()) and not bool(torch.stack(seen).all(0).any())
    other = survivors(made(moec, site(layer=1, layers=2)))
    assert not torch.equal(other.alive_E, survivors(made(moec)).alive_E)


def decision(probs):
    empty = torch.full((len(probs), 1), -1)
    routing = Routing(empty, torch.zeros(len(probs), 1), probs.log(), probs)
    return Decision(inputs(len(probs)), context(len(probs)), routing, routing)


def test_the_cluster_loss():
    alike = torch.tensor([[0.2, 0.2, 0.3, 0.3], [0.4, 0.4, 0.1, 0.1]])
    assert float(Clustering(2, 1.0, "ratio", 1e-3)(decision(alike))) == pytest.approx(0, abs=1e-9)
    mixed = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    inside, between = variances(mixed, 2)
    assert float(inside) == pytest.approx(0.01) and float(between) == pytest.approx(0.0025)
    assert float(Clustering(2, 2.0, "ratio", 0.0)(decision(mixed))) == pytest.approx(8.0, rel=1e-5)
    assert float(Clustering(2, 2.0, "difference", 0.0)(decision(mixed))) == pytest.approx(0.015, rel=1e-5)
    assert bool(Clustering(2, 1.0, "ratio", 1e-3)(decision(torch.full((1, 4), 0.25))).isfinite())


@pytest.mark.parametrize("options", [{"clusters": 8}, {"drop": 0.0}])
def test_without_dropping_it_is_the_plain_gate(options):
    router = made(moec, cluster=0.0, capacity=0.0, **options)
    routing = router(inputs(), context())
    plain = router(inputs(), context(training=False))
    assert torch.equal(routing.experts_TK, plain.experts_TK) and torch.equal(routing.weights_TK, plain.weights_TK)
    assert router.penalties(router.decide(inputs(), context()))["cluster"] == 0


def test_capacity_counts_survivors():
    router = made(moec, drop=0.5, capacity=1.0)
    load = chosen(router(inputs(64), context(64))).sum(0)
    assert int(load.max()) == 16, "64 tokens over 4 survivors"


@pytest.mark.parametrize("options", [{"clusters": 3}, {"drop": 1.0}, {"form": "sum"}, {"interval": 0}, {"temperature": 0.0}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(InputError):
        made(moec, **options)
