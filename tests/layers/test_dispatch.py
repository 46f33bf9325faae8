"""Sorted dispatch: equal to loops written out, gradients equal to finite differences, ragged, empty experts and tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moestro.core.experts import ExpertSpec
from moestro.core.routing import Routing
from moestro.layers.dispatch import combine, gather, grouped_linear, order_of, swiglu
from moestro.layers.experts import ACTIVATIONS, Joined, Stacked
from moestro.layers.memory import LARGE, fresh

RAGGED = torch.tensor([[3, 0], [-1, 3], [-1, -1], [0, -1], [5, 3]])  # experts 1, 2 and 4 of 6 are chosen by nobody


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def routing(dtype=torch.float32):
    weights = torch.rand(RAGGED.shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Routing(RAGGED, weights.masked_fill(RAGGED < 0, 0.0))


def test_order_agrees_with_the_pairs_of_the_routing():
    order, pairs = order_of(RAGGED, 6), routing().pairs(6)
    assert torch.equal(order.token_N, pairs.token_N) and torch.equal(order.experts_N, pairs.expert_N)
    assert order.starts == pairs.starts_E1.tolist()
    assert torch.equal(order.flat_N % 2, pairs.slot_N)
    in_token_order = order.token_N[order.place_N]
    assert torch.equal(in_token_order, in_token_order.sort().values)


def test_an_id_beyond_the_experts_is_an_error():
    with pytest.raises(AssertionError, match="beyond E"):
        order_of(RAGGED, 5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_stacked_equals_a_loop(activation, gated, bias):
    torch.manual_seed(0)
    bank = Stacked(6, ExpertSpec(8, 12, activation, gated, bias), std=0.5)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.5)
    x, route = torch.randn(5, 8, requires_grad=True), routing()
    weights = route.weights_TK.requires_grad_()
    expected = torch.zeros(5, 8)
    for t, slot in (RAGGED >= 0).nonzero().tolist():
        w, e = bank.weights(int(RAGGED[t, slot])), ACTIVATIONS[activation]
        up = functional.linear(x[t], w.up_FD, w.up_F)
        inner = e(functional.linear(x[t], w.gate_FD, w.gate_F)) * up if gated else e(up)
        y = functional.linear(inner, w.down_DF, w.down_D)
        expected = expected.index_add(0, torch.tensor([t]), (weights[t, slot] * y)[None])
    found = bank.run(x, route)
    torch.testing.assert_close(found, expected)
    inputs, target = [x, weights, *bank.parameters()], torch.randn(5, 8)
    for a, b in zip(torch.autograd.grad(found, inputs, target), torch.autograd.grad(expected, inputs, target), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 6, 4, dtype=torch.float64, requires_grad=True)
    down = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    mix = routing(torch.float64).weights_TK.requires_grad_()
    order = order_of(RAGGED, 6)

    def layer(x, weight, down, mix):
        h = swiglu(grouped_linear(gather(x, order), weight, order.starts))
        return combine(grouped_linear(h, down, order.starts), Routing(RAGGED, mix), order)

    assert torch.autograd.gradcheck(layer, (x, weight, down, mix))


def test_an_expert_nobody_chooses_has_zero_gradient():
    bank = Stacked(6, ExpertSpec(8, 12))
    bank.run(torch.randn(5, 8), routing()).sum().backward()
    for gradient in (bank.gate_up_EFD.grad, bank.down_EDF.grad):
        used = gradient.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (3, 2)])
def test_no_pairs(shape):
    bank, x = Stacked(4, ExpertSpec(8, 12)), torch.randn(shape[0], 8, requires_grad=True)
    empty = Routing(torch.full(shape, -1), torch.zeros(shape, requires_grad=True))
    y = bank.run(x, empty)
    assert torch.equal(y, torch.zeros(shape[0], 8))
    y.sum().backward()


def test_joined_banks_are_one_bank():
    torch.manual_seed(0)
    whole = Stacked(6, ExpertSpec(8, 12), std=0.5)
    parts = [Stacked(2, ExpertSpec(8, 12)), Stacked(4, ExpertSpec(8, 12))]
    for part, (a, b) in zip(parts, [(0, 2), (2, 6)], strict=True):
        part.load_state_dict({name: value[a:b] for name, value in whole.state_dict().items()})
    x, joined = torch.randn(5, 8), Joined(parts)
    assert torch.equal(joined.run(x, routing()), whole.run(x, routing()))
    assert joined.num == 6 and joined.costs == whole.costs
    assert torch.equal(joined.weights(3).up_FD, whole.weights(3).up_FD)
    assert torch.equal(joined.output(x, 4), whole.output(x, 4))


def test_autocast_computes_in_its_type():
    bank, x = Stacked(6, ExpertSpec(8, 12)), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = bank.run(x.bfloat16(), routing())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), bank.run(x, routing()), rtol=0.05, atol=1e-3)


def test_fresh_memory_is_an_ordinary_tensor():
    for count in (3, LARGE // 4, LARGE // 4 + 1001):
        made = fresh(torch.zeros(1), (count,)).fill_(2.0)
        assert made.shape == (count,) and float(made.sum()) == 2.0 * count
