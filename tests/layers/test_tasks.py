"""M3ViT: one router per task, the balance of each task, and experts computed one after another."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.core.routing import Routing
from moestro.layers.banks.reordered import Reordered
from moestro.layers.losses.importance import squared_variation
from moestro.layers.routers.noisy_topk import load
from moestro.layers.routers.tasks import tasks
from tests.layers.sites import context, dense, inputs, made

TASK = torch.arange(24) // 8 % 2


def at(task_T=TASK, training=True):
    ctx = context(training=training)
    ctx.carry["domain_T"] = task_T
    return ctx


def test_a_task_never_meets_the_router_of_another():
    router, x = made(tasks), inputs()
    before = router(x, at())
    with torch.no_grad():
        router.score.gates[1].weight.normal_()
    after = router(x, at())
    own = TASK == 0
    assert torch.equal(dense(before)[own], dense(after)[own]) and not torch.equal(dense(before)[~own], dense(after)[~own])
    alone = router.decide(x, at(torch.zeros(24, dtype=torch.int64)))
    (alone.routing.weights_TK.sum() + sum(router.penalties(alone).values())).backward()
    assert router.score.gates[0].weight.grad.abs().sum() > 0 and router.score.gates[1].weight.grad is None


def test_weights_are_raw_probabilities():
    router, x = made(tasks), inputs()
    p = torch.stack([(x[t] @ router.score.gates[int(TASK[t])].weight.T).softmax(-1) for t in range(24)])
    best = p.topk(2, -1)
    routing = router(x, at())
    assert torch.equal(routing.experts_TK, best.indices)
    torch.testing.assert_close(routing.weights_TK, best.values)


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_the_loss_is_the_mean_of_the_tasks_in_the_batch(noise):
    router = made(tasks, noise=noise, balance=0.5)
    decision = router.decide(inputs(), at())
    expected = []
    for task in (0, 1):
        mine = task == TASK
        sums = dense(decision.chosen)[mine].sum(0)
        if noise:
            clean = decision.ctx.notes["clean_TE"][mine].detach()
            smooth = load(clean, torch.full_like(clean, noise / 8), decision.logits_TE[mine].detach(), 2)
        else:
            smooth = (dense(decision.chosen)[mine] > 0).float().sum(0)
        expected.append(float(squared_variation(sums) + squared_variation(smooth)))
    assert router.penalties(decision)["balance"].item() == pytest.approx(0.5 * sum(expected) / 2, rel=1e-5)


def test_conditioned_routing_reads_the_task():
    router, x = made(tasks, mode="conditioned"), inputs()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=0.5)
    a, b = (router(x, at(torch.full((24,), t))) for t in (0, 1))
    assert not torch.allclose(dense(a), dense(b))


@pytest.mark.parametrize("options", [{"tasks": 0}, {"mode": "both"}])
def test_refused(options):
    with pytest.raises(InputError):
        made(tasks, **options)


def test_an_unknown_task_is_refused():
    with pytest.raises(InputError, match="task 2"):
        made(tasks)(inputs(), at(TASK + 1))


class Counted(Reordered):
    """Counts loads, and how many loaded experts there are at once."""

    def load(self, e, buffer):
        with self.lock:
            self.loads.append((e, buffer[0].data_ptr()))
        return super().load(e, buffer)


def test_experts_are_loaded_once_each_into_two_buffers():
    torch.manual_seed(0)
    bank = Counted(8, ExpertSpec(16, 6), std=0.3)
    bank.loads, bank.lock = [], threading.Lock()
    ids = torch.randint(0, 6, (30, 1), generator=torch.Generator().manual_seed(0))
    weights, x = torch.rand(30, 1), inputs(30)
    with torch.no_grad():
        y = bank.run(x, Routing(ids, weights))
    assert [e for e, _ in bank.loads] == sorted(set(ids.flatten().tolist())), "the distinct experts hit, not the tokens"
    places = [place for _, place in bank.loads]
    assert len(set(places)) == 2 and all(a != b for a, b in pairwise(places))
    alone = torch.cat([weights[t] * bank.output(x[t : t + 1], int(ids[t])) for t in range(30)])
    torch.testing.assert_close(y, alone.detach())
    torch.testing.assert_close(bank.run(x, Routing(ids, weights)).detach(), y)
