"""UniPool: gates of unit length, one pool for all layers, balance of the pool."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import Tap
from moestro.layers.block import MoEBlock
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.losses.pool import pool
from moestro.layers.routers.norm import norm, unit_scale
from tests.layers.sites import context, dense, inputs, made, site

CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=3, heads=2, num_experts=6, top_k=1, d_expert=8, architecture="unipool", router="norm",
    losses=({"name": "pool", "weight": 0.1},), init_std=0.3,
)  # fmt: skip


def test_the_length_of_the_logits_does_not_matter():
    x, router = inputs(), made(norm)
    longer = router.tapped(Tap("logits", lambda z, ctx: 7.5 * z))
    a, b = router(x, context()), longer(x, context())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_weights_are_the_rule_and_have_length_one_on_average(top_k):
    where = site(top_k=top_k)
    x, router = inputs(2000), made(norm, where)
    with torch.no_grad():
        torch.nn.init.orthogonal_(router.score.gate.weight)  # logits are then independent normal numbers
    routing = router(x, context(2000))
    z = x @ router.score.gate.weight.T
    s = unit_scale(8, top_k) * (z / z.norm(dim=1, keepdim=True)).relu()
    kept = torch.zeros_like(s).scatter(1, s.topk(top_k, 1).indices, 1.0)
    torch.testing.assert_close(dense(routing), s * kept)
    assert float(routing.weights_TK.detach().square().sum(1).mean()) == pytest.approx(1.0, abs=0.05)


def test_for_large_pools_the_scale_is_the_papers():
    u = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(9))
    best = (u / u.norm(dim=1, keepdim=True)).relu().topk(2, 1).values.square().sum(1)
    assert unit_scale(64, 2) == pytest.approx(float(best.rsqrt().mean()), rel=0.05)


def test_a_score_of_zero_takes_no_slot():
    router = made(norm)
    nobody = router.tapped(Tap("logits", lambda z, ctx: -z.abs() - 1))(inputs(), context())
    assert bool((nobody.experts_TK == -1).all()) and bool((nobody.weights_TK == 0).all())


def test_all_layers_read_one_storage_and_their_gradients_add_up():
    model = build(CONFIG)
    banks = [block.experts for block in model.modules() if isinstance(block, MoEBlock)]
    assert len(banks) == 3 and len({id(bank) for bank in banks}) == 1
    plain = build(replace(CONFIG, architecture="decoder", losses=()))
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters()) == 2 * 6 * 3 * 16 * 8
    grouped = build(replace(CONFIG, architecture={"name": "unipool", "group": 2}))
    owners = [id(block.experts) for block in grouped.modules() if isinstance(block, MoEBlock)]
    assert owners[0] == owners[1] != owners[2]


def test_disjoint_allocations_are_a_plain_model():
    pooled = build(replace(CONFIG, router={"name": "norm", "allocated": 2})).eval()
    plain = build(replace(CONFIG, architecture="decoder", num_experts=2, losses=())).eval()
    state = pooled.state_dict()
    with torch.no_grad():
        for name, target in plain.state_dict().items():
            layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
            source = state[name]
            target.copy_(source[2 * layer : 2 * layer + 2] if source.shape != target.shape else source)
            if name.endswith("allowed_E"):
                target.fill_(True)
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    a, b = pooled(tokens), plain(tokens)
    torch.testing.assert_close(a.logits_BTV, b.logits_BTV)
    for layer, (r, s) in enumerate(zip(a.routings, b.routings, strict=True)):
        assert torch.equal(r.experts_TK, torch.where(s.experts_TK < 0, s.experts_TK, s.experts_TK + 2 * layer))


def test_the_pool_is_balanced_by_the_counts_of_the_batch_before():
    base = site(layers=2)
    routers = [made(norm, replace(base, layer=i), weights=i) for i in (0, 1)]
    losses = [pool(replace(base, layer=i), weight=0.5) for i in (0, 1)]
    x, seen, said = inputs(), [], []
    for _ in range(2):
        ctx = context()
        decisions = [router.decide(x, ctx) for router in routers]
        said.append([loss(d).item() for loss, d in zip(losses, decisions, strict=True)])
        seen.append(decisions)
    assert said[0] == [0.0, 0.0], "there is no batch before the first"
    count = sum(torch.bincount(d.chosen.experts_TK.flatten() + 1, minlength=9)[1:] for d in seen[0])
    for value, d in zip(said[1], seen[1], strict=True):
        assert value == pytest.approx(0.5 * 8 * (count / count.sum() * d.probs_TE.mean(0)).sum().item() / 2, rel=1e-5)


def test_uniform_use_gives_the_sum_of_the_scores():
    where = site()
    loss, decision = pool(where, weight=1.0), made(norm, where).decide(inputs(), context())
    loss.usage.now_E.fill_(3.0)
    assert loss(decision).item() == pytest.approx(decision.probs_TE.mean(0).sum().item(), rel=1e-5)


def test_more_allocated_than_the_pool_has_is_refused():
    with pytest.raises(InputError):
        norm(site(layers=3), allocated=4)
