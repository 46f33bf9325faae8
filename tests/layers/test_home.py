"""HoME: the mask of the hierarchy, gates for features and for oneself, normalised experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.blocks.home import home
from tests.layers.sites import context, inputs, made, site

TASKS = torch.arange(24) % 4


def on(task_T, **changes):
    return replace(context(), carry={"domain_T": task_T}, **changes)


def test_experts_of_other_tasks_get_no_gradient_and_no_token():
    block = made(home)
    out = block(inputs(), on(torch.full((24,), 1)))  # task 1: group 0
    out.y_TD.square().sum().backward()
    # Level 2: global, shared of groups 0 and 1, own of tasks 0 to 3.
    touched = block.experts.up_EFI.grad.flatten(1).abs().sum(1) > 0
    assert touched.tolist() == [True, True, False, False, True, False, False]
    assert set(out.routings[2].experts_TK.unique().tolist()) == {0, 1, 4}
    assert set(out.routings[0].experts_TK.unique().tolist()) == {0, 1}
    assert float(block.group_gate.weight.grad.unflatten(0, (2, 3))[1].abs().sum()) == 0.0


def test_a_mixed_batch_is_each_task_alone():
    block = made(home).eval()
    ctx = on(TASKS, training=False)
    whole = block(inputs(), ctx).y_TD
    for task in range(4):
        alone = block(inputs(), on(torch.full((24,), task), training=False)).y_TD
        torch.testing.assert_close(whole[task == TASKS], alone[task == TASKS])


def test_the_gate_on_features_is_one_until_both_maps_are_there():
    gates = made(home).features
    torch.testing.assert_close(gates(inputs()), torch.ones(24, 3, 16))
    for up, down in zip(gates.up, gates.down, strict=True):
        torch.nn.init.normal_(up, std=0.5)
        torch.nn.init.zeros_(down)
    torch.testing.assert_close(gates(inputs()), torch.ones(24, 3, 16))
    torch.nn.init.normal_(gates.down[0], std=0.1)
    changed = gates(inputs()).detach()
    assert bool(((changed - 1).abs() > 0.05).any()) and float(changed.min()) > 0 and float(changed.max()) < 2


def test_outputs_have_mean_zero_and_variance_one_before_swish():
    bank = made(home, site(init_std=1.0)).meta
    rows = bank.normal(torch.cat([inputs(100, seed=e) * 10**e for e in range(3)]), [0, 100, 200, 300], True).view(3, 100, 16)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3, 16), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.var(1, unbiased=False), torch.ones(3, 16), atol=1e-2, rtol=0)


def test_a_private_expert_that_the_gate_ignores_learns_by_its_own():
    block = made(home)
    with torch.no_grad():
        block.task_gate.weight.unflatten(0, (4, 7))[0].zero_()
    ignored = torch.zeros(7).index_fill(0, torch.tensor([3]), float("-inf"))
    block.task_gate.register_forward_hook(lambda m, i, z: (z.unflatten(-1, (4, 7)) + ignored).flatten(1))
    out = block(inputs(), on(torch.zeros(24, dtype=torch.int64)))
    assert float(out.routings[2].probs_TE[:, 3].detach().abs().max()) == 0.0
    out.y_TD.square().sum().backward()
    assert float(block.experts.up_EFI.grad[3].abs().sum()) > 0


def test_the_rule_written_out_for_one_token():
    block = made(home).eval()
    x, t = inputs(), 3  # task 3, group 1
    y = block(x, on(TASKS, training=False)).y_TD[t]

    def expert(bank, e, v):
        h = bank.down_EDF[e] @ torch.nn.functional.silu(bank.up_EFI[e] @ v) / (1 + 1e-5) ** 0.5
        return torch.nn.functional.silu(h)

    v = x[t]
    first = [expert(block.meta, e, v) for e in range(3)]
    gate = (block.group_gate.weight.unflatten(0, (2, 3))[1] @ v)[[0, 2]].softmax(0)
    z_c = gate[0] * first[0] + (gate[1] + (block.group_self.weight[2] @ v).sigmoid()) * first[2]
    z_s = sum(g * y for g, y in zip((block.shared_gate.weight @ v).softmax(0), first, strict=True))
    z = torch.cat((z_c, z_s))
    seen = [0, 2, 6]
    gate = (block.task_gate.weight.unflatten(0, (4, 7))[3] @ z)[seen].softmax(0)
    gate = gate + torch.tensor([0.0, 0.0, 1.0]) * (block.task_self.weight[6] @ z).sigmoid()
    torch.testing.assert_close(y, sum(g * expert(block.experts, e, z) for g, e in zip(gate, seen, strict=True)))


def test_training_reads_the_batch_and_evaluation_does_not():
    block, x, later = made(home), inputs(), inputs()
    later[20:] += 1
    leaks = [block(v, on(TASKS)).y_TD[:20] for v in (x, later)]
    assert not torch.allclose(*leaks, atol=1e-3)
    block.eval()
    torch.testing.assert_close(*(block(v, on(TASKS, training=False)).y_TD[:20] for v in (x, later)))


@pytest.mark.parametrize("options", [{"groups": [0, 2]}, {"own": 0}, {"ranks": [0]}, {"momentum": 0.0}])
def test_refused(options):
    with pytest.raises(InputError):
        made(home, **options)


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="task 4"):
        made(home)(inputs(), on(TASKS + 1))


def test_no_tokens():
    out = made(home)(inputs(0), on(TASKS[:0]))
    assert out.y_TD.shape == (0, 16)
