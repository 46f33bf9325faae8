"""Latent experts: the factored form is the multiplied one; conversion is the best common projection."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.core.routing import Routing
from moestro.layers.banks.latent import Latent, factor, latent
from moestro.layers.experts import Stacked
from tests.layers.sites import made, site


def routing(tokens=20, experts=8):
    g = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(experts, generator=g)[:3] for _ in range(tokens)])
    return Routing(ids, torch.rand(ids.shape, generator=g))


def bank(spec, width, group, experts=8):
    torch.manual_seed(0)
    return Latent(experts, spec, width, group, 0.3, 0.3)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_it_is_experts_with_the_factors_multiplied_out(group, gated):
    spec = ExpertSpec(16, 6, "silu", gated)
    small, full = bank(spec, 5, group), Stacked(8, spec)
    with torch.no_grad():
        for e in range(8):
            w = small.weights(e)
            full.gate_up_EFD[e] = torch.cat([w.gate_FD, w.up_FD]) if gated else w.up_FD
            full.down_EDF[e] = w.down_DF
    x = torch.randn(20, 16)
    torch.testing.assert_close(small.run(x, routing()), full.run(x, routing()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.output(x, 3), full.output(x, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [2, 4])
def test_conversion_recovers_what_was_made_of_common_projections(group):
    spec = ExpertSpec(16, 6)
    source, full = bank(spec, 5, group), Stacked(8, spec)
    with torch.no_grad():
        for e in range(8):
            w = source.weights(e)
            full.gate_up_EFD[e], full.down_EDF[e] = torch.cat([w.gate_FD, w.up_FD]), w.down_DF
    again = Latent(8, spec, 5, group, 1.0, 1.0).convert(full)
    x = torch.randn(20, 16)
    torch.testing.assert_close(again.run(x, routing()), full.run(x, routing()), rtol=1e-4, atol=1e-5)


def test_the_error_is_the_discarded_singular_values_and_nothing_is_better():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 10, generator=g)
    a, b = factor(rows, 4)
    error = (rows - a @ b).square().sum().sqrt()
    torch.testing.assert_close(error, torch.linalg.svdvals(rows)[4:].square().sum().sqrt())
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(10, 4, generator=g)).Q.T
        assert (rows - rows @ other.T @ other).norm() > error


def test_the_full_width_is_the_identity():
    spec = ExpertSpec(16, 6)
    full = Stacked(8, spec, std=0.3)
    x = torch.randn(20, 16)
    same = Latent(8, spec, 16, 8, 1.0, 1.0).convert(full)
    torch.testing.assert_close(same.run(x, routing()), full.run(x, routing()), rtol=1e-4, atol=1e-5)


def test_parameters_are_as_the_card_says():
    spec = ExpertSpec(16, 6)
    assert sum(p.numel() for p in bank(spec, 5, 4).parameters()) == 2 * (4 * (2 * 6 * 5 + 6 * 16) + 2 * 5 * 16)


def test_all_parts_learn():
    made_one = made(latent)
    made_one.run(torch.randn(20, 16), routing()).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in made_one.parameters())


@pytest.mark.parametrize("options", [{"width": 17}, {"group": 3}])
def test_refused(options):
    with pytest.raises(InputError):
        made(latent, site(), **options)
