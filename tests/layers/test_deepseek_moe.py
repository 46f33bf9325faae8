"""DeepSeekMoE: cut experts, expert and device losses."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.core.routing import Routing, Tap
from moestro.layers.blocks.segmented import segmented, segmented_site
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build, site_of
from moestro.layers.experts import Stacked
from moestro.layers.routers.deepseek_moe import deepseek_moe
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, inputs, made, site


@pytest.mark.parametrize("gated", [True, False])
def test_all_slices_of_an_expert_with_weight_1_are_the_expert(gated):
    torch.manual_seed(0)
    whole, cut = Stacked(2, ExpertSpec(16, 12, "silu", gated), std=0.3), Stacked(8, ExpertSpec(16, 3, "silu", gated), std=0.3)
    with torch.no_grad():
        for part in range(8):
            e, rows = part // 4, slice(3 * (part % 4), 3 * (part % 4) + 3)
            inner = whole.gate_up_EFD[e].unflatten(0, (-1, 12))[:, rows].flatten(0, 1)
            cut.gate_up_EFD[part], cut.down_EDF[part] = inner, whole.down_EDF[e][:, rows]
    x, ids = inputs(6), torch.tensor([[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3)
    found = cut.run(x, Routing(ids, torch.ones(6, 4)))
    torch.testing.assert_close(found, whole.run(x, Routing(ids[:, :1] // 4, torch.ones(6, 1))), rtol=1e-5, atol=1e-6)


CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=1, heads=2, num_experts=8, top_k=2, d_expert=16)


@pytest.mark.parametrize(("segments", "shared"), [(1, 0), (4, 1), (8, 3)])
def test_cutting_changes_neither_total_nor_active_parameters(segments, shared):
    block = segmented(site_of(CONFIG, 0, {}), segments=segments, shared=shared)
    always = block.shared.bank.costs[0] if block.shared is not None else 0
    plain = 3 * 16 * 16
    assert sum(block.experts.costs) + always == 8 * plain
    active = block.router(inputs(), context()).slots
    assert active == 2 * segments - shared and block.experts.num == 8 * segments - shared
    assert active * block.experts.costs[0] + always == 2 * plain


def test_every_token_meets_the_shared_experts():
    block = build(MoEConfig.from_json(CONFIG.to_json() | {"block": "segmented"})).layers[0].block
    out, x = block(inputs(), context()), inputs()
    torch.testing.assert_close(out.y_TD, block.experts.run(x, out.routings[0]) + block.shared(x))
    with torch.no_grad():
        block.experts.down_EDF.zero_()
    torch.testing.assert_close(block(inputs(), context()).y_TD, block.shared(x))
    assert float(block.shared(x).detach().abs().min()) > 0


def test_the_losses_by_hand():
    router = made(deepseek_moe, balance=0.5, devices=4, device_balance=2.0)
    decision = router.decide(inputs(), context())
    count_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=8).float()
    f_E, p_E = 8 / (2 * 24) * count_E, decision.probs_TE.mean(0)
    assert float(f_E.sum()) == pytest.approx(8)
    found = router.penalties(decision)
    torch.testing.assert_close(found["balance"], 0.5 * (f_E * p_E).sum())
    device = sum(f_E[2 * d : 2 * d + 2].mean() * p_E[2 * d : 2 * d + 2].sum() for d in range(4))
    torch.testing.assert_close(found["device_balance"], 2.0 * device)


def test_even_loads_have_loss_1():
    even = 5.0 * torch.eye(8) + 4.0 * torch.eye(8).roll(1, 1)
    router = made(deepseek_moe, balance=1.0, devices=2, device_balance=1.0).tapped(Tap("logits", lambda z, ctx: even))
    losses = router.penalties(router.decide(inputs(8), context(8)))
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx({"balance": 1.0, "device_balance": 1.0})


def test_weights_are_raw_and_the_choice_is_top_k():
    a, b = made(deepseek_moe)(inputs(), context()), made(topk, combine="raw")(inputs(), context())
    assert torch.equal(a.experts_TK, b.experts_TK) and torch.equal(a.weights_TK, b.weights_TK)
    assert list(made(deepseek_moe).losses) == ["balance"]


@pytest.mark.parametrize("cut", [{"segments": 3, "shared": 0}, {"segments": 1, "shared": 2}, {"segments": 0, "shared": 0}])
def test_cuts_that_cannot_be(cut):
    with pytest.raises(InputError):
        segmented_site(site(), **cut)


def test_devices_that_do_not_divide():
    with pytest.raises(InputError, match="3 devices"):
        made(deepseek_moe, devices=3)
