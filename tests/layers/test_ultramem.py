"""UltraMemV2: the best cells, what is read, and the ring that layers share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.blocks.ultramem import Memory, Ring, ultramem
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from tests.layers.sites import context, inputs, made, site


def memory(n=6, k=6, width=8, layer=0, share=0.5, seed=0):
    torch.manual_seed(seed)
    return Memory(site(layer=layer, layers=2), Ring(int(n * n / share), width, 0.5), n, k, width, 2)


def test_with_all_rows_kept_it_is_the_best_of_all_cells():
    found, x = memory(), inputs()
    s1, s2 = found.scores(x)
    grid = torch.einsum("tia,cab,tjb->tijc", s1, found.cores, s2).flatten(1, 2)
    best = grid.sum(-1).topk(6, -1).indices
    address, weight = found.find(x)
    assert torch.equal(address.sort(1).values, best.sort(1).values)
    torch.testing.assert_close(weight, grid.gather(1, address[..., None].expand(-1, -1, 2)))


def test_fewer_rows_are_the_best_of_their_own_grid():
    found, x = memory(n=10, k=3), inputs()
    with torch.no_grad():
        address, _ = found.find(x)
        s1, s2 = found.scores(x)
        u, v = found.directions(False)
    cores = found.cores.detach()
    for t in range(3):
        rows, columns = (s1[t] @ u).topk(3).indices, (s2[t] @ v).topk(3).indices
        cells = {int(i * 10 + j): float(torch.einsum("a,cab,b->", s1[t, i], cores, s2[t, j])) for i in rows for j in columns}
        assert set(address[t].tolist()) == set(sorted(cells, key=cells.get)[-3:])


def test_the_output_is_the_sum_of_the_rows_written_out():
    found, x = memory(n=5, k=3), inputs(4)
    o, address, weight = found(x, False)
    for t in range(4):
        total = torch.zeros(8)
        for a, w in zip(address[t].tolist(), weight[t], strict=True):
            row = (int(found.permutation[a]) + found.offset) % 50
            match = found.ring.pre_RP[row] @ (found.pre.weight @ x[t])
            total += match * found.ring.value_RV[row] * w.repeat_interleave(4)
        torch.testing.assert_close(o[t], found.out.weight @ total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [8, 20])
def test_a_token_reads_the_same_number_of_rows_whatever_n_is(n):
    found = memory(n=n, k=4)
    o, address, _ = found(inputs(1), False)
    o.sum().backward()
    touched = (found.ring.value_RV.grad.abs().sum(1) > 0).sum()
    assert address.shape == (1, 4) and int(touched) == 4


def test_layers_share_the_ring_and_begin_in_different_places():
    config = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, d_expert=8, block={"name": "ultramem", "n": 8, "rows": 4})
    a, b = (layer.block.memory for layer in build(config).layers)
    assert a.ring is b.ring and a.offset == 0 and b.offset == len(b.ring.value_RV) // 2
    one = replace(site(), layers=2)
    first, second = (made(ultramem, replace(one, layer=0), n=8) for _ in range(2))
    assert first.memory.offset == second.memory.offset and first.memory.ring is second.memory.ring


def test_directions_keep_their_sign_in_training_and_leave_evaluation_alone():
    found = memory()
    u, v = found.directions(True)
    with torch.no_grad():
        found.cores.mul_(-1)
    before = found.last_2r.clone()
    found.directions(False)
    assert torch.equal(before, found.last_2r)
    u2, v2 = found.directions(True)
    assert float(u @ u2 + v @ v2) >= 0


def test_everything_learns():
    block = made(ultramem)
    block(inputs(), context()).y_TD.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in block.parameters())


@pytest.mark.parametrize("options", [{"rows": 33}, {"width": 3}, {"share": 0.0}])
def test_refused(options):
    with pytest.raises(InputError):
        made(ultramem, **options)
