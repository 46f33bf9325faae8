"""MoE-X: predicted sparsity."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.layers.banks.zero import zero
from moestro.layers.experts import Joined, Stacked
from moestro.layers.routers.moe_x import moe_x
from tests.layers.sites import context, dense, inputs, made, site


def where(width=6, d=16, bias=False, gated=False):
    torch.manual_seed(0)
    bank = Stacked(8, ExpertSpec(d, width, "relu", gated, bias), std=0.3)
    with torch.no_grad():  # means that differ, as after training
        bank.gate_up_EFD.add_(0.1 * torch.randn(8, 1, d))
        if bias:
            bank.gate_up_EF.normal_()
    return replace(site(d_model=d), experts=bank)


@pytest.mark.parametrize("bias", [False, True])
def test_the_prediction_is_close_to_the_measured_share(bias):
    at = where(256, 64, bias)
    x = inputs(40, 64)
    rho_TE = -made(moe_x, at)(x, context(40)).logits_TE.detach()
    hidden = torch.einsum("td,efd->tef", x, at.experts.gate_up_EFD) + (at.experts.gate_up_EF if bias else 0.0)
    measured = (hidden.detach() > 0).float().mean(-1)
    assert float((rho_TE - measured).abs().mean()) < 0.03
    assert float(measured.std()) > 0.1, "experts differ"
    assert float(torch.corrcoef(torch.stack((rho_TE.flatten(), measured.flatten())))[0, 1]) > 0.95


def test_the_sparsest_are_chosen():
    at = where()
    routing = made(moe_x, at)(inputs(), context())
    assert torch.equal(routing.experts_TK, (-routing.logits_TE).argsort(1)[:, :2])


def test_the_prediction_does_not_depend_on_length():
    router = made(moe_x, where())
    torch.testing.assert_close(router(3.0 * inputs(), context()).logits_TE, router(inputs(), context()).logits_TE)


def test_weighted_experts_are_one_wide_sparse_network():
    at = where()
    routing = made(moe_x, at)(inputs(), context())
    hidden = (inputs() @ at.experts.gate_up_EFD.flatten(0, 1).t()).relu() * dense(routing).repeat_interleave(6, 1)
    wide = hidden @ at.experts.down_EDF.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(at.experts.run(inputs(), routing), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_reaches_the_experts_first_weights_unless_detached(detach):
    at = where(gated=True)
    router = made(moe_x, at, detach=detach)
    assert not list(router.parameters()), "the experts are the block's"
    loss = router(inputs(), context()).weights_TK[:, 0].sum()
    assert loss.requires_grad is not detach
    if not detach:
        loss.backward()
        first, second = at.experts.gate_up_EFD.grad[:, :6], at.experts.gate_up_EFD.grad[:, 6:]
        assert float(first.abs().sum()) > 0 and bool((second == 0).all()), "the gate's rows, not the others"


def test_experts_of_several_widths_and_of_other_kinds():
    a, b = Stacked(3, ExpertSpec(16, 4, "relu", False)), Stacked(5, ExpertSpec(16, 9, "relu", False))
    routing = made(moe_x, replace(site(), experts=Joined([a, b])))(inputs(), context())
    mean = torch.cat((a.gate_up_EFD.mean(1), b.gate_up_EFD.mean(1)))
    assert routing.logits_TE.shape == (24, 8)
    assert torch.equal(routing.logits_TE < -0.5, inputs() @ mean.t() > 0)
    with pytest.raises(InputError, match="Zero"):
        made(moe_x, replace(site(), experts=Joined([a, zero(site())])))
