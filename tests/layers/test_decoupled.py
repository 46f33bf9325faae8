"""Decoupled weights, and the block that mixes them with an always-on expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.decoupled import decoupled
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, inputs, made, site


def test_without_the_adapter_it_is_the_host():
    ours, host = made(decoupled), made(topk, combine="raw")
    with torch.no_grad():
        ours.combine.adapter.weight.zero_()
    a, b = ours(inputs(), context()), host(inputs(), context())
    assert torch.equal(a.experts_TK, b.experts_TK) and torch.equal(a.weights_TK, b.weights_TK)


def test_the_adapter_changes_weights_and_never_the_choice():
    router = made(decoupled)
    before = router(inputs(), context())
    with torch.no_grad():
        router.combine.adapter.weight.normal_(std=3.0)
    after = router(inputs(), context())
    assert torch.equal(before.experts_TK, after.experts_TK)
    a_TE = inputs() @ router.combine.adapter.weight.t()
    torch.testing.assert_close(after.weights_TK, (after.probs_TE + a_TE).gather(1, after.experts_TK))
    assert float(after.weights_TK.detach().min()) < 0, "contributions may be negative"


def test_the_loss_and_its_schedule():
    router = made(decoupled)
    for step, weight in ((0, 0.01), (499, 0.01), (500, 0.005)):
        decision = router.decide(inputs(), context(step=step))
        f_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=8) / 24
        expected = weight * (f_E * decision.probs_TE.mean(0)).mean()
        torch.testing.assert_close(router.penalties(decision)["balance"], expected)


CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=1, heads=2, num_experts=4, top_k=1, d_expert=8, router="decoupled", block="halved", init_std=0.3
)  # fmt: skip


def test_equal_experts_copied_from_the_dense_one():
    block = build(CONFIG).layers[0].block
    with torch.no_grad():
        block.routed.experts.gate_up_EFD.copy_(block.always.bank.gate_up_EFD.expand(4, -1, -1))
        block.routed.experts.down_EDF.copy_(block.always.bank.down_EDF.expand(4, -1, -1))
    x = inputs()
    out, ffn = block(x, context()), block.always(x)
    torch.testing.assert_close(out.y_TD, 0.5 * ffn + 0.5 * out.routings[0].weights_TK * ffn)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shares(share):
    block = build(replace(CONFIG, block={"name": "halved", "share": share})).layers[0].block
    out = block(inputs(), context())
    routed = block.routed.experts.run(inputs(), out.routings[0])
    torch.testing.assert_close(out.y_TD, share * block.always(inputs()) + (1 - share) * routed)
    assert list(out.losses) == ["balance"]


def test_what_cannot_be():
    with pytest.raises(InputError):
        build(replace(CONFIG, block={"name": "halved", "share": 1.5}))
    with pytest.raises(InputError):
        made(decoupled, site(top_k=9))
