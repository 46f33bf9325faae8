"""Stages, taps and the three example routers against closed forms; bad configurations; the decoder's masks and memory block."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext, Routing, Tap
from moestro.layers.banks.low_rank import LowRank
from moestro.layers.banks.ternary import Ternary, ternary_of
from moestro.layers.banks.widths import arithmetic, widths
from moestro.layers.block import Output
from moestro.layers.blocks.product_key import ProductKey
from moestro.layers.config import MoEConfig, Part
from moestro.layers.decoder import build
from moestro.layers.experts import Stacked, spec_at
from moestro.layers.routers.deepseek_v3 import deepseek_v3
from moestro.layers.routers.noisy_topk import load
from moestro.layers.routers.switch import switch
from moestro.layers.routers.topk import topk
from moestro.layers.site import Site
from moestro.layers.stages import COMBINE, Combine, Draft, where
from moestro.layers.taps.capacity import Capacity, rank
from moestro.layers.taps.loss_free import LossFree

SITE = Site(d_model=16, num_experts=8, top_k=2, d_expert=12, init_std=0.5)
CTX = RouteContext(training=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_combine_conventions():
    z = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    p, ids = z.softmax(-1), torch.tensor([[0, 2], [-1, -1]])
    chosen = torch.tensor([2.0, 0.0])
    expected = {
        "raw": p[0, [0, 2]],
        "renormalised": p[0, [0, 2]] / p[0, [0, 2]].sum(),
        "softmax": chosen.softmax(-1),
        "sigmoid": chosen.sigmoid(),
        "constant": torch.ones(2),
    }
    assert set(expected) == set(COMBINE)
    for convention, want in expected.items():
        found = Combine(convention, 2.5)(Draft(z, z, p, ids), CTX)
        torch.testing.assert_close(found, torch.stack((2.5 * want, torch.zeros(2))))
    with pytest.raises(InputError):
        Combine("average")


def test_where_turns_a_mask_into_slots():
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    assert where(mask, torch.tensor([[0.1, 0.9, 0.5]] * 3)).tolist() == [[2, 0], [-1, -1], [1, -1]]
    assert where(mask[:0], torch.zeros(0, 3)).shape[0] == 0


def test_masked_experts_leave_empty_slots():
    router = topk(SITE).tapped(Tap("choice", lambda s, ctx: s.index_fill(1, torch.arange(1, 8), float("-inf"))))
    routing = router(torch.randn(3, 16))
    assert routing.experts_TK.tolist() == [[0, -1]] * 3
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.0, 0.0]] * 3))


@pytest.mark.parametrize("order", ["slot", "token"])
def test_rank_counts_what_comes_before(order):
    ids = torch.randint(-1, 4, (20, 3))
    seen, expected = [0] * 4, torch.full((20, 3), -1)
    places = [(t, k) for k in range(3) for t in range(20)] if order == "slot" else [(t, k) for t in range(20) for k in range(3)]
    for t, k in places:
        if (e := int(ids[t, k])) >= 0:
            expected[t, k] = seen[e]
            seen[e] += 1
    assert torch.equal(rank(ids, 4, order), expected)


def test_capacity():
    routing = topk(SITE)(torch.randn(40, 16))
    before = torch.bincount(routing.experts_TK.flatten(), minlength=8)
    tap = Capacity(SITE, 1.0, 0.0)
    after = tap(routing, CTX)
    kept = torch.bincount(after.experts_TK.flatten() + 1, minlength=9)[1:]
    assert tap.limit(routing, True) == 10
    assert torch.equal(kept, before.clamp_max(10)) and int(before.max()) > 10
    assert tap(routing, dataclasses.replace(CTX, training=False)) is routing
    assert torch.equal(Capacity(SITE, 4.0, 0.0)(routing, CTX).experts_TK, routing.experts_TK), "factor E / K drops nothing"


def test_switch():
    x = torch.randn(40, 16)
    router = switch(SITE, capacity=1.0, balance=1.0).train()
    decision = router.decide(x, CTX)
    probs = (x @ router.score.gate.weight.T).softmax(-1)
    top, best = probs.max(-1)
    torch.testing.assert_close(decision.chosen.weights_TK[:, 0], top)
    assert torch.equal(decision.chosen.experts_TK[:, 0], best)
    kept = decision.routing.experts_TK[:, 0] >= 0
    assert int(torch.bincount(best[kept], minlength=8).max()) <= 5 and 0 < int(kept.sum()) < 40
    f = torch.bincount(best, minlength=8) / 40
    torch.testing.assert_close(router.penalties(decision)["balance"], 8 * (f * probs.mean(0)).sum())
    assert not Stacked(8, spec_at(SITE)).run(x, decision.routing)[~kept].any(), "a dropped token gets nothing"
    free = switch(SITE, capacity=8.0)
    assert int((free.decide(x, CTX).routing.experts_TK < 0).sum()) == 0
    jittered = switch(SITE, capacity=0, jitter=0.5)
    assert not torch.equal(jittered.decide(x, CTX).logits_TE, jittered(x, RouteContext()).logits_TE)


def test_noisy_load_is_a_probability():
    clean, sigma, k, draws = torch.randn(1, 6), torch.rand(1, 6) + 0.5, 2, 40000
    noisy = clean + sigma * torch.randn(1, 6)
    expected = torch.zeros(6)
    for e in range(6):  # fresh noise on one logit, the others as they are
        tried = noisy.repeat(draws, 1)
        tried[:, e] = clean[0, e] + sigma[0, e] * torch.randn(draws)
        expected[e] = (tried.topk(k, -1).indices == e).any(1).float().mean()
    torch.testing.assert_close(load(clean, sigma, noisy, k), expected, atol=0.015, rtol=0)
    assert float(load(clean, sigma, noisy, 6).sum()) == 6


def test_deepseek_v3():
    x = torch.randn(50, 16)
    router = deepseek_v3(SITE, groups=4, kept=2, scale=2.5, rate=0.1)
    tap = next(t.fn for t in router.taps if isinstance(t.fn, LossFree))
    tap.bias_E.normal_()
    routing = router(x)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((50,), 2.5))
    s = (x @ router.score.gate.weight.T).sigmoid()
    assert max(len({int(e) // 2 for e in row}) for row in routing.experts_TK.tolist()) <= 2
    for t in range(50):
        biased = s[t] + tap.bias_E
        groups = biased.view(4, 2).sum(1).topk(2).indices
        allowed = torch.full((4, 2), float("-inf"))
        allowed[groups] = 0
        best = (biased + allowed.flatten()).topk(2).indices
        assert torch.equal(best, routing.experts_TK[t])
        torch.testing.assert_close(routing.weights_TK[t], 2.5 * s[t][best] / s[t][best].sum())
    before = routing.experts_TK
    tap.bias_E += 3.0
    assert torch.equal(router(x).experts_TK, before), "a constant changes nothing"
    for bad in ({"groups": 3}, {"groups": 4, "kept": 5}, {"groups": 8, "kept": 2}):
        with pytest.raises(InputError):
            deepseek_v3(SITE, **bad)


def test_loss_free_moves_against_the_load():
    tap = LossFree(SITE, 0.1)
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [3, 4]])  # counts 3 2 1 1 1 0 0 0, mean 1
    made = Output(torch.zeros(0), {}, (Routing(ids, torch.ones(4, 2)),))
    tap.after_step([made], 0)
    torch.testing.assert_close(tap.bias_E, 0.1 * torch.tensor([-1.0, -1, 0, 0, 0, 1, 1, 1]))
    even = Output(torch.zeros(0), {}, (Routing(torch.arange(8).view(4, 2), torch.ones(4, 2)),))
    before = tap.bias_E.clone()
    tap.after_step([even, even], 1)
    assert torch.equal(tap.bias_E, before)
    assert not list(tap.parameters())
    plain, biased = topk(SITE), LossFree(SITE, 0.1)
    x = torch.randn(5, 16)
    assert torch.equal(plain.tapped(biased)(x).experts_TK, plain(x).experts_TK)
    share = LossFree(SITE, 1.0, "proportional")
    share.after_step([made], 0)
    torch.testing.assert_close(share.bias_E, torch.tensor([-2.0, -1, 0, 0, 0, 1, 1, 1]))


def test_balancing_balances():
    """A skewed router and a controller: the load evens out, the weights do not change."""
    router, x = topk(SITE, score="sigmoid", balance=0), torch.randn(256, 16) + 1.0
    tap = LossFree(SITE, 0.02)
    tapped = router.tapped(tap)
    first = torch.bincount(tapped(x).experts_TK.flatten(), minlength=8).float()
    for step in range(100):
        tap.after_step([Output(x, {}, (tapped(x),))], step)
    last = torch.bincount(tapped(x).experts_TK.flatten(), minlength=8).float()
    assert float(first.max() / first.mean()) > 1.5 > 1.15 > float(last.max() / last.mean())


def test_low_rank_experts_start_equal_and_equal_full_ones():
    bank, x = LowRank(SITE, 3), torch.randn(7, 16)
    torch.testing.assert_close(bank.output(x, 0), bank.output(x, 5))
    with torch.no_grad():
        bank.in_b.normal_(), bank.out_b.normal_()
    w = bank.weights(5)
    expected = (torch.nn.functional.silu(x @ w.gate_FD.T) * (x @ w.up_FD.T)) @ w.down_DF.T
    torch.testing.assert_close(bank.output(x, 5), expected, rtol=1e-4, atol=1e-4)


def test_ternary_weights_have_three_values_and_a_straight_gradient():
    weight = torch.randn(2, 5, 6, requires_grad=True)
    rounded = ternary_of(weight)
    assert all(len(expert.unique()) <= 3 for expert in rounded)
    target = torch.randn(2, 5, 6)
    torch.testing.assert_close(torch.autograd.grad(rounded, weight, target)[0], target)
    bank, x = Ternary(3, spec_at(SITE)), torch.randn(4, 16)
    w = bank.weights(1)
    expected = (torch.nn.functional.silu(x @ w.gate_FD.T) * (x @ w.up_FD.T)) @ w.down_DF.T
    torch.testing.assert_close(bank.output(x, 1), expected)


def test_widths():
    assert arithmetic(8, 16, 0.5625) == [9, 11, 13, 15, 17, 19, 21, 23]
    assert all(sum(arithmetic(n, 100, 0.3)) == 100 * n for n in range(1, 9))
    bank = widths(dataclasses.replace(SITE, num_experts=3), widths=[4, 8, 32])
    assert [cost // (3 * 16) for cost in bank.costs] == [4, 8, 32]
    for bad in ([1, 2], [0, 1, 2]):
        with pytest.raises(InputError):
            widths(dataclasses.replace(SITE, num_experts=3), widths=bad)


def test_product_keys_find_the_best_of_all_neurons():
    block, x = ProductKey(SITE, n=6, k=3, heads=2, width=5), torch.randn(4, 16)
    with torch.no_grad():
        block.down_ND.normal_()
    q = block.norm(block.query(x).view(4, 2, 2, 5))
    expected = torch.zeros(4, 16)
    for head in range(2):
        scores = (q[:, head, 0] @ block.keys_HSNW[head, 0].T)[:, :, None] + (q[:, head, 1] @ block.keys_HSNW[head, 1].T)[:, None]
        best, ids = scores.flatten(1).topk(3, -1)
        for t in range(4):
            hidden = torch.nn.functional.gelu(block.up_ND[ids[t]] @ x[t]) * best[t].softmax(-1)
            expected[t] += hidden @ block.down_ND[ids[t]]
    out = block(x, CTX)
    torch.testing.assert_close(out.y_TD, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.routings[0].weights_TK.sum(1), torch.full((4,), 2.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 9}, "top_k 9 with num_experts 8"),
        ({"heads": 3}, "3 heads"),
        ({"kv_heads": 3}, "3 key heads"),
        ({"dense_layers": [7]}, "dense layer 7"),
        ({"d_expert": 0}, "d_expert is 0"),
        ({"qk_norm": "some"}, "qk_norm"),
        ({"colour": 1}, "no setting 'colour'"),
        ({"d_model": "wide"}, "d_model is 'wide'"),
        ({"tied": 1}, "tied is 1"),
        ({"router": 3}, "does not name a method"),
        ({"losses": "z"}, "losses is 'z'"),
    ],
)
def test_configurations_that_cannot_be(changes, words):
    with pytest.raises(InputError, match=words):
        MoEConfig.from_json({**MoEConfig().to_json(), **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "swich"}, "did you mean switch"),
        ({"router": {"name": "switch", "capacty": 1}}, "no option 'capacty'"),
        ({"router": {"name": "deepseek_v3", "groups": 5}}, "5 groups of 8"),
        ({"activation": "tanh"}, "activation 'tanh'"),
        ({"losses": ("switch",)}, "not a method of kind 'loss'"),
    ],
)
def test_models_that_cannot_be_built(changes, words):
    with pytest.raises(InputError, match=words):
        build(MoEConfig(**changes))


def test_configuration_round_trip():
    config = MoEConfig(
        router=Part("switch", {"capacity": 1.5}), dense_layers=(0,), losses=("z",), special=({"name": "zero", "count": 3},)
    )
    text = json.dumps(config.to_json())
    assert MoEConfig.from_json(text) == config
    assert config.to_json()["router"] == {"name": "switch", "capacity": 1.5} and config.to_json()["losses"] == ["z"]
    for bad in ("{", "[1]"):
        with pytest.raises(InputError):
            MoEConfig.from_json(bad)


TINY = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=4, kv_heads=2, d_expert=12, context=16, init_std=0.3)


def test_packed_documents_do_not_see_each_other():
    model = build(TINY).eval()
    row = torch.randint(0, 32, (1, 10))
    segment, position = torch.tensor([[0] * 4 + [1] * 6]), torch.tensor([[*range(4), *range(6)]])
    with torch.no_grad():
        packed = model(row, segment_BT=segment, position_BT=position).logits_BTV
        torch.testing.assert_close(packed[:, :4], model(row[:, :4]).logits_BTV)
        torch.testing.assert_close(packed[:, 4:], model(row[:, 4:]).logits_BTV)


@pytest.mark.parametrize("tokens", [torch.zeros(1, 17, dtype=torch.int64), torch.tensor([[32]]), torch.tensor([[-1]])])
def test_tokens_that_cannot_be(tokens):
    with pytest.raises(InputError):
        build(TINY)(tokens)


def test_zero_tokens():
    out = build(dataclasses.replace(TINY, losses=("z",), router="deepseek_v3"))(torch.zeros(2, 0, dtype=torch.int64))
    assert out.logits_BTV.shape == (2, 0, 32) and all(float(loss.detach()) == 0 for loss in out.losses.values())


def test_building_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second = build(TINY), build(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_losses_of_layers_add_up_and_light_outputs_keep_the_routing():
    model = build(dataclasses.replace(TINY, losses=({"name": "z", "weight": 1.0},)))
    out = model(torch.randint(0, 32, (2, 8)))
    expected = sum(r.logits_TE.logsumexp(-1).square().mean() for r in out.routings)
    torch.testing.assert_close(out.losses["z"], expected)
    light = out.light()
    assert light.logits_BTV.numel() == 0 and torch.equal(light.routings[1].experts_TK, out.routings[1].experts_TK)
    assert not light.routings[0].weights_TK.requires_grad
