"""ERC: the coupling loss written out, where it is zero, its noise, and where it reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import block_at, build, site_of
from moestro.layers.losses.erc import bounds, coupling, erc, perturbed
from moestro.layers.routers.topk import topk
from tests.layers.sites import context, inputs, made, site, with_bank


def parts(**options):
    where = with_bank(site())
    router = made(topk, where)
    return where.experts, router, erc(where, **options)


def test_written_out():
    bank, router, loss = parts(alpha=0.5, noise=False)
    rows = router.score.gate.weight.detach()
    m = [[float((rows[i] @ bank.weights(j).gate_FD.detach().t()).norm()) for j in range(8)] for i in range(8)]
    expected = sum(
        max(m[i][j] - 0.5 * m[i][i], 0) + max(m[j][i] - 0.5 * m[i][i], 0) for i in range(8) for j in range(8) if i != j
    )
    found = loss(router.decide(inputs(), context()))
    assert float(found.detach()) == pytest.approx(expected / 64, rel=1e-5)
    found.backward()
    assert float(router.score.gate.weight.grad.abs().sum()) > 0
    grad = bank.gate_up_EFD.grad.abs().sum((0, 2))
    assert float(grad[:8].sum()) > 0 == float(grad[8:].sum()), "the gate projections only"
    assert not list(loss.parameters()), "the experts stay the block's"


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_zero_for_orthonormal_rows_and_rank_one_experts(alpha):
    bank, router, loss = parts(alpha=alpha, noise=False)
    rows = torch.linalg.qr(inputs(16, 16))[0][:8]
    with torch.no_grad():
        router.score.gate.weight.copy_(rows)
        bank.gate_up_EFD[:, :8] = torch.ones(8)[None, :, None] * rows[:, None, :]
    assert float(loss(router.decide(inputs(), context())).detach()) == pytest.approx(0, abs=1e-5)


def test_zero_exactly_where_the_diagonal_dominates():
    m = torch.eye(3) + 0.5
    assert coupling(m, 1.0) == 0 < coupling(m, 0.3)
    assert coupling(torch.tensor([[1.0, 0.2], [0.9, 1.0]]), 1.0) == 0
    row_only, column_only = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[3.0, 2.0], [0.0, 1.0]])
    assert coupling(row_only, 1.0) == coupling(column_only, 1.0) == 0.25, "rows and columns are each held"


def test_identical_experts_leave_only_column_terms():
    bank, router, loss = parts(noise=False)
    with torch.no_grad():
        bank.gate_up_EFD.copy_(bank.gate_up_EFD[:1].clone())
    length = (router.score.gate.weight @ bank.weights(0).gate_FD.t()).norm(dim=1).detach()
    expected = (length[:, None] - length[None, :]).relu().sum() / 64
    torch.testing.assert_close(loss(router.decide(inputs(), context())).detach(), expected)


def test_noise_stays_within_half_the_distance_to_the_nearest_row():
    rows = inputs(8, 16)
    near = (rows[:, None] - rows[None]).norm(dim=-1).fill_diagonal_(9e9).min(1).values
    torch.testing.assert_close(bounds(rows), near / 2 / rows.norm(dim=1))
    for seed in range(20):
        moved = (perturbed(rows, context(seed=seed)) - rows).norm(dim=1)
        assert bool((moved <= near / 2 + 1e-6).all()) and float(moved.max()) > 0


def test_the_batch_does_not_matter_and_draws_do():
    _, router, loss = parts()
    values = [float(loss(router.decide(inputs(n, seed=n), context(n, seed=s))).detach()) for n, s in ((24, 0), (7, 0), (24, 1))]
    assert values[0] == pytest.approx(values[1]) != values[2]


def test_mean_over_layers():
    alone, four = (erc(with_bank(site(layers=layers)), noise=False) for layers in (1, 4))
    decision = made(topk).decide(inputs(), context())
    torch.testing.assert_close(alone(decision), 4 * four(decision))


CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=1, heads=2, num_experts=4, d_expert=8, losses=("erc",))


def test_special_experts_take_no_part_and_saved_state_does_not_grow():
    with_zero = replace(CONFIG, special=("zero",))
    torch.manual_seed(0)
    block = block_at(site_of(with_zero, 0, {}))
    assert bool(block(inputs(), context()).losses["erc"].isfinite())
    assert set(build(CONFIG).state_dict()) == set(build(replace(CONFIG, losses=())).state_dict())


def test_routers_and_experts_it_cannot_read_are_refused():
    with pytest.raises(InputError, match="linear gate"):
        build(replace(CONFIG, router="thor"))(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="stacked"):
        build(replace(CONFIG, experts="sublayers"))
