"""OpenMoE: buffers that fill up along the sequence, and the recipe."""

from __future__ import annotations

import math

import torch

from moestro.layers.decoder import build
from moestro.layers.experts import Shared
from moestro.layers.routers.openmoe import openmoe
from moestro.layers.routers.topk import topk
from moestro.train.config import read_config
from tests.layers.sites import chosen, context, dense, inputs, made, site


def both(factor, length=8, **changes):
    """(before drops, after) of 24 tokens in sequences of a length."""
    router = made(openmoe, site(**changes), capacity=factor)
    decision = router.decide(inputs() + 1.0, context(length=length))
    return decision.chosen, decision.routing


def test_each_sequence_keeps_the_smaller_of_load_and_places():
    before, after = both(1.0, num_experts=4, length=12)
    limit = math.ceil(1.0 * 12 * 2 / 4)
    load, kept = (chosen(r, 4).view(2, 12, 4).sum(1) for r in (before, after))
    assert torch.equal(kept, load.clamp_max(limit)) and int((load > limit).sum()) > 0


def test_a_token_loses_its_place_to_earlier_ones_only():
    before, after = both(0.75, num_experts=4, length=12)
    limit = math.ceil(0.75 * 12 * 2 / 4)
    had, has = (chosen(r, 4).view(2, 12, 4) for r in (before, after))
    earlier = had.int().cumsum(1) - had.int()
    assert torch.equal(had & ~has, had & (earlier >= limit)) and bool((had & ~has).any())
    lost = (had & ~has).sum((0, 2))
    assert int(lost[:6].sum()) < int(lost[6:].sum()), "towards the end"


def test_enough_places_drop_nothing_and_it_is_top_k():
    before, after = both(8 / 2)
    assert torch.equal(before.experts_TK, after.experts_TK)
    plain = made(topk, combine="raw")(inputs() + 1.0, context())
    assert torch.equal(dense(plain), dense(after))


def test_a_batch_without_sequences_is_one():
    router, ctx = made(openmoe, capacity=0.5), context()
    whole = router(inputs(), context(length=24)).experts_TK
    ctx = type(ctx)(training=True)
    assert torch.equal(router(inputs(), ctx).experts_TK, whole)


def test_the_losses_are_balance_and_z():
    router = made(openmoe, z=0.5)
    decision = router.decide(inputs(), context())
    found = router.penalties(decision)
    torch.testing.assert_close(found["z"], 0.5 * decision.logits_TE.logsumexp(1).square().mean())
    f_E = torch.bincount(decision.chosen.experts_TK.flatten(), minlength=8) / 48
    torch.testing.assert_close(found["balance"], 0.01 * 8 * (f_E * decision.probs_TE.mean(0)).sum())


def test_the_recipe_has_experts_in_every_third_layer_beside_a_dense_one():
    config = read_config("openmoe")
    model = build(config.model)
    moe = [i for i, layer in enumerate(model.layers) if hasattr(layer.block, "router")]
    assert moe == [2, 5] and all(isinstance(model.layers[i].block.shared, Shared) for i in moe)
    assert config.model.vocabulary == 257 + config.objective.options["marks"] and config.objective.name == "mixed_denoising"
