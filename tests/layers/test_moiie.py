"""MoIIE: who sees whom, the balance of each modality, and what a batch of one modality leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.block import MoEBlock
from moestro.layers.experts import Stacked, spec_at
from moestro.layers.modality import modality_of
from moestro.layers.routers.moiie import moiie
from tests.layers.sites import chosen, context, dense, inputs, made, site

IDS = torch.randint(0, 32, (24,), generator=torch.Generator().manual_seed(0))
IMAGE = (IDS >= 14) & (IDS < 31)


def test_a_token_sees_its_own_and_the_shared_experts():
    routing = made(moiie, site(top_k=3))(inputs(), context(ids=IDS))
    mask = chosen(routing)
    assert torch.equal(modality_of(IDS, (14, 31)).bool(), IMAGE) and IMAGE.any() and not IMAGE.all()
    assert not bool(mask[IMAGE][:, 6:].any()) and not bool(mask[~IMAGE][:, :2].any())
    torch.testing.assert_close(dense(routing).sum(1), torch.ones(24))
    torch.testing.assert_close(routing.probs_TE.detach().sum(1), torch.ones(24))


def test_it_is_top_k_of_the_modalitys_gate():
    router, x = made(moiie), inputs()
    routing = router(x, context(ids=IDS))
    z = x[IMAGE] @ router.score.gates[1].weight.T
    best = z.topk(2, -1)
    assert torch.equal(routing.experts_TK[IMAGE], best.indices)
    torch.testing.assert_close(routing.weights_TK[IMAGE], best.values.softmax(-1))
    z = x[~IMAGE] @ router.score.gates[0].weight.T
    assert torch.equal(routing.experts_TK[~IMAGE], z.topk(2, -1).indices + 2)


@pytest.mark.parametrize("which", ["both", "image", "text"])
def test_the_loss_is_that_of_each_modality_that_is_there(which):
    ids = {"both": IDS, "image": torch.full((24,), 20), "text": torch.full((24,), 3)}[which]
    router = made(moiie, balance=0.5)
    decision = router.decide(inputs(), context(ids=ids))
    expected, mask, probs = 0.0, chosen(decision.chosen).float(), decision.probs_TE.detach()
    for mine in (modality_of(ids, (14, 31)) == kind for kind in (0, 1)):
        if mine.any():
            expected += 0.5 * 6 * float((mask[mine].mean(0) * probs[mine].mean(0)).sum())
    assert router.penalties(decision)["balance"].item() == pytest.approx(expected, rel=1e-5)


def test_images_leave_the_experts_of_language_alone():
    where = replace(site(), init_std=0.3)
    bank = Stacked(8, spec_at(where), std=0.3)
    block = MoEBlock(made(moiie, where), bank)
    block(inputs(), context(ids=torch.full((24,), 20))).y_TD.square().sum().backward()
    used = bank.down_EDF.grad.abs().sum((1, 2))
    assert bool((used[6:] == 0).all()) and float(used[:6].sum()) > 0
    assert block.router.score.gates[0].weight.grad is None or not block.router.score.gates[0].weight.grad.any()


def test_equal_experts_are_the_dense_layer():
    where = site()
    bank = Stacked(8, spec_at(where), std=0.3)
    with torch.no_grad():
        for w in bank.parameters():
            w.copy_(w[:1].expand_as(w))
    x = inputs()
    torch.testing.assert_close(MoEBlock(made(moiie), bank)(x, context(ids=IDS)).y_TD, bank.output(x, 0))


@pytest.mark.parametrize(("where", "options"), [({"num_experts": 6}, {}), ({"top_k": 7}, {}), ({}, {"image": [5, 2]})])
def test_refused(where, options):
    with pytest.raises(InputError):
        moiie(site(**where), **options)
