"""Hash layers: a pure function of the id, balanced tables, blocks."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.routers.hash import hash_router
from tests.layers.sites import chosen, context, inputs, made, site

IDS = torch.randint(0, 32, (24,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("training", [True, False])
def test_routing_follows_the_id_alone(training):
    router = made(hash_router)
    a = router(inputs(seed=1), context(training=training, ids=IDS))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    b = router(inputs(seed=2), context(training=training, step=900, seed=5, ids=IDS[order]))
    assert torch.equal(a.experts_TK[order], b.experts_TK)
    assert bool((a.weights_TK == 1).all()) and a.experts_TK.shape == (24, 1)
    assert not list(router.parameters())


def test_a_balanced_table_evens_a_skewed_corpus():
    frequency = torch.arange(1, 257).double().reciprocal() + 0.02
    assert float(frequency.max() / frequency.sum()) < 1 / 8
    where = site(vocabulary=256)
    load = {}
    for kind in ("balanced", "random"):
        table = made(hash_router, where, kind=kind, frequencies=frequency.tolist()).score.table_XJ[:, 0]
        load_E = torch.zeros(8, dtype=torch.float64).index_add(0, table, frequency)
        load[kind] = float(load_E.max() / load_E.mean() - 1)
    assert load["balanced"] < 0.02 < 0.1 < load["random"]


def test_without_frequencies_experts_get_equally_many_ids():
    table = made(hash_router).score.table_XJ
    assert torch.bincount(table[:, 0], minlength=8).tolist() == [4] * 8


def test_tables_by_layer_and_seed():
    tables = [made(hash_router, site(layer=i), per_layer=True).score.table_XJ for i in (0, 1)]
    assert not torch.equal(*tables)
    assert torch.equal(made(hash_router, site(layer=3)).score.table_XJ, made(hash_router).score.table_XJ)
    assert not torch.equal(made(hash_router, seed=1).score.table_XJ, tables[0])


def test_several_hashes_pick_one_expert_of_each_block():
    routing = made(hash_router, hashes=4)(inputs(), context(ids=IDS))
    blocks = chosen(routing).unflatten(1, (4, 2)).sum(-1)
    assert bool((blocks == 1).all())


def test_bigrams_know_the_previous_id_of_the_same_sequence():
    router = made(hash_router, bigrams=True, buckets=997)
    ids = torch.tensor([1, 2, 3, 2] + [9] * 4 + [2, 7, 2, 3] + [9] * 4)
    rows = router.score._key(context(16, ids=ids))
    assert rows[2] == rows[11], "2 then 3, in either sequence"
    assert rows[1] != rows[3], "2 after 1 and after 3"
    alone = router.score._key(context(8, ids=ids[8:]))
    assert torch.equal(alone, rows[8:]), "the first id of a sequence has no previous one"


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="token ids"):
        made(hash_router)(inputs(), context())
    for options in ({"kind": "sha"}, {"hashes": 3}, {"frequencies": [1.0]}):
        with pytest.raises(InputError):
            made(hash_router, **options)
