"""StableMoE: two routers, and the phase that settles on the second."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.stable_moe import stable_moe
from moestro.train.phases.freeze_routing import FreezeRouting
from tests.layers.sites import context, inputs, made, site

IDS = torch.randint(0, 32, (24,), generator=torch.Generator().manual_seed(3))


def router(**options):
    found = made(stable_moe, **options)
    with torch.no_grad():
        found.score.centroid_ED.normal_()
    return found


def settle(module):
    return FreezeRouting(at=0.0)(module, torch.optim.SGD(module.parameters(), lr=0.1), 0, 10)


def test_stage_1_is_greedy_with_the_sigmoid_of_the_score():
    found = router(capacity=0.0)
    routing = found(inputs(), context(ids=IDS))
    s_TE = inputs() @ found.score.centroid_ED.t()
    assert torch.equal(routing.experts_TK[:, 0], s_TE.argmax(1))
    torch.testing.assert_close(routing.weights_TK[:, 0], s_TE.amax(1).sigmoid())


@pytest.mark.parametrize("training", [True, False])
def test_stage_2_and_evaluation_route_by_id(training):
    found = router(capacity=0.0)
    if training:
        assert settle(found) == {"stage": 2.0}
    routing = found(inputs(), context(ids=IDS, training=training))
    table_V = (found.score.ids_VW @ found.score.distilled_EW.t()).argmax(1)
    assert torch.equal(routing.experts_TK[:, 0], table_V[IDS]) and len(table_V.unique()) > 2
    s_TE = inputs() @ found.score.centroid_ED.t()
    torch.testing.assert_close(routing.weights_TK, s_TE.gather(1, routing.experts_TK).sigmoid())
    other = found(inputs(seed=9), context(ids=IDS, training=training))
    assert torch.equal(routing.experts_TK, other.experts_TK), "no context, only ids"


def test_bigrams_begin_anew_with_each_sequence():
    found = router(bigrams=True)
    routing = found(inputs(), context(ids=IDS, training=False))
    emb = found.score.ids_VW[IDS]
    before = torch.cat((emb[:1], emb[:-1]))
    before[::8] = emb[::8]
    torch.testing.assert_close(routing.logits_TE, (emb + before) / 2 @ found.score.distilled_EW.t())


def test_the_losses_by_hand():
    found = router(balance=0.3, distil=0.2)
    decision = found.decide(inputs(), context(ids=IDS))
    s_TE = inputs() @ found.score.centroid_ED.t()
    best, even = s_TE.argmax(1), 24 / 8
    total = sum(
        ((best == e).sum() - even) / even * sum((s_TE[t, e].sigmoid() for t in range(24) if best[t] == e), torch.zeros(()))
        for e in range(8)
    )
    losses = found.penalties(decision)
    torch.testing.assert_close(losses["balance"], 0.3 * total / 24)
    distilled = found.score.ids_VW[IDS] @ found.score.distilled_EW.t()
    torch.testing.assert_close(losses["distil"], 0.2 * torch.nn.functional.cross_entropy(distilled, best))


def test_distilling_moves_the_distilled_router_alone_and_balance_the_centroids_alone():
    for name, moved in (("distil", {"score.ids_VW", "score.distilled_EW"}), ("balance", {"score.centroid_ED"})):
        found = router()
        found.penalties(found.decide(inputs(), context(ids=IDS)))[name].backward()
        assert {n for n, p in found.named_parameters() if p.grad is not None and bool((p.grad != 0).any())} == moved


def test_a_crowded_expert_is_pushed_away_and_an_empty_one_is_pulled():
    found = router()
    with torch.no_grad():
        found.score.centroid_ED.zero_()
        found.score.centroid_ED[:2, 0] = torch.tensor([3.0, -3.0])
    x = torch.ones(24, 16)
    x[23, 0] = -1.0  # 23 tokens of expert 0, one of expert 1
    decision = found.decide(x, context(ids=IDS))
    decision.logits_TE.retain_grad()
    found.penalties(decision)["balance"].backward()
    assert bool((decision.logits_TE.grad[:23, 0] > 0).all()) and float(decision.logits_TE.grad[23, 1]) < 0


def test_settled_routers_have_no_losses_and_their_distilled_part_no_gradient():
    found = router()
    settle(found)
    decision = found.decide(inputs(), context(ids=IDS))
    assert {float(loss) for loss in found.penalties(decision).values()} == {0.0}
    decision.routing.weights_TK.sum().backward()
    assert found.score.ids_VW.grad is None and found.score.distilled_EW.grad is None
    assert float(found.score.centroid_ED.grad.abs().sum()) > 0, "the weight still learns"


CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=1, heads=2, num_experts=4, d_expert=8, router="stable_moe", experts="sublayers"
)


def test_the_layer_starts_as_the_identity():
    block = build(CONFIG).layers[0].block
    assert bool((block(inputs(), context(ids=IDS)).y_TD == 0).all())


def test_distilled_and_learned_router_come_to_agree_and_nothing_churns_afterwards():
    """Inputs depend on the id, with noise; the phase settles half way."""
    found, g = router(capacity=0.0), torch.Generator().manual_seed(0)
    means = torch.randn(32, 16, generator=g)
    optimiser = torch.optim.Adam(found.parameters(), lr=0.05)
    phase, tables, agree = FreezeRouting(at=0.5), [], 0.0
    for step in range(80):
        ids = torch.randint(0, 32, (24,), generator=g)
        x = means[ids] + 0.3 * torch.randn(24, 16, generator=g)
        phase(found, optimiser, step, 80)
        optimiser.zero_grad()
        decision = found.decide(x, context(ids=ids))
        (sum(found.penalties(decision).values()) - 0.1 * decision.routing.weights_TK.mean()).backward()
        optimiser.step()
        if step == 39:
            learned = (means @ found.score.centroid_ED.t()).argmax(1)
            distilled = found(means, context(32, ids=torch.arange(32), training=False)).experts_TK[:, 0]
            agree = float((learned == distilled).float().mean())
        if step >= 39:
            tables.append(found(means, context(32, ids=torch.arange(32), training=False)).experts_TK)
    assert agree > 0.8
    assert all(torch.equal(tables[0], table) for table in tables)


def test_what_cannot_be():
    with pytest.raises(InputError, match="without token ids"):
        router()(inputs(), RouteContext())
    with pytest.raises(InputError):
        made(stable_moe, site(vocabulary=0))
