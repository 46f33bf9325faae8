"""RMoE: the recurrent cell over layers."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.rmoe import STATE, rmoe
from tests.layers.sites import context, inputs, made

P = 6
CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=3, heads=2, num_experts=8, d_expert=8, init_std=0.5, router={"name": "rmoe", "width": P}
)


def test_parameters_of_all_layers():
    model = build(CONFIG)
    routers = [layer.block.router for layer in model.layers]
    found = {id(p): p.numel() for router in routers for p in router.parameters()}
    assert sum(found.values()) == 3 * (P * 16 + 8 * P) + 6 * P * P + 6 * P
    assert routers[0].score.cell is routers[2].score.cell
    assert all(bool((p == 0).all()) for name, p in routers[0].score.cell.named_parameters() if "bias" in name)


def test_the_cell_written_out():
    router, before, ctx = made(rmoe, width=P), torch.randn(24, P), context()
    ctx.carry[STATE] = before
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    found = router(inputs(), ctx)
    s = router.score
    u = inputs() @ s.project.weight.t()
    ir, iz, i_n = (u @ s.cell.weight_ih.t() + s.cell.bias_ih).chunk(3, 1)
    hr, hz, hn = (before @ s.cell.weight_hh.t() + s.cell.bias_hh).chunk(3, 1)
    r, q = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    state = (1 - q) * (i_n + r * hn).tanh() + q * before
    torch.testing.assert_close(ctx.carry[STATE], state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits_TE, state @ s.head.weight.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.weights_TK.sum(1), torch.ones(24))


def test_a_tokens_routing_is_that_token_alone():
    """The state goes through layers, not through time: one token at a time routes as all at once."""
    router, state = made(rmoe, width=P), torch.randn(24, P)
    ctx = context()
    ctx.carry[STATE] = state
    whole = router(inputs(), ctx).logits_TE
    for t in (0, 7, 23):
        alone = context(1)
        alone.carry[STATE] = state[t : t + 1]
        torch.testing.assert_close(router(inputs()[t : t + 1], alone).logits_TE, whole[t : t + 1])


def test_the_state_carries_what_was_routed_and_its_gradient():
    model = build(CONFIG)
    tokens = torch.arange(8)[None]
    before = model(tokens).routings[2].logits_TE
    model(tokens).routings[2].weights_TK.square().sum().backward()
    assert float(model.layers[0].block.router.score.project.weight.grad.abs().sum()) > 0
    for layer in model.layers:  # only the routers' state joins the layers then
        with torch.no_grad():
            layer.block.experts.down_EDF.zero_()
    silent = model(tokens).routings[2].logits_TE
    with torch.no_grad():
        model.layers[0].block.router.score.project.weight.add_(1.0)
    assert not torch.allclose(before, silent) and not torch.allclose(model(tokens).routings[2].logits_TE, silent)


def test_what_cannot_be():
    with pytest.raises(InputError):
        made(rmoe, width=0)
