"""ProMoE: the split by condition, cosine routing, the contrastive loss."""

from __future__ import annotations

import math

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.routers.prototypes import prototypes
from tests.layers.sites import context, dense, inputs, made, site

DROPPED = torch.arange(24) // 8 == 1


def at(dropped=None):
    ctx = context()
    if dropped is not None:
        ctx.carry["unconditional_T"] = dropped
    return ctx


def test_all_and_only_unconditional_tokens_meet_the_last_expert():
    routing = made(prototypes)(inputs(), at(DROPPED))
    weights = dense(routing)
    assert torch.equal(weights[DROPPED], torch.eye(8)[7].expand(8, 8)) and not bool((weights[~DROPPED][:, 7] != 0).any())
    assert bool((dense(made(prototypes)(inputs(), at()))[:, 7] == 0).all()), "nobody is unconditional unless it is said"


@pytest.mark.parametrize("score", ["identity", "sigmoid", "softmax"])
def test_weights_are_of_the_cosine_and_the_length_does_not_matter(score):
    router, x = made(prototypes, score=score), inputs()
    a, b = router(x, at()), router(5 * x, at())
    torch.testing.assert_close(dense(a), dense(b))
    cosine = torch.nn.functional.cosine_similarity(x[:, None], router.score.prototypes_ED[None], dim=-1)
    assert torch.equal(a.experts_TK, cosine.topk(2, -1).indices)
    if score != "softmax":
        value = cosine.sigmoid() if score == "sigmoid" else cosine
        torch.testing.assert_close(a.weights_TK, value.topk(2, -1).values)


def penalty(router, x, dropped=None):
    decision = router.decide(x, at(dropped))
    return router.penalties(decision)["contrast"].item()


def test_equal_cosines_cost_ln_n_and_distinct_prototypes_nothing():
    router = made(prototypes, site(top_k=1))
    with torch.no_grad():
        router.score.prototypes_ED.copy_(torch.eye(16)[:7])
    x = torch.eye(16)[:7].repeat(4, 1)[:24]
    assert penalty(router, x) == pytest.approx(0.0, abs=1e-4)
    shifted = router.tapped()  # tokens that all look alike: every prototype is as near to every mean
    alike = torch.ones(24, 16)
    with torch.no_grad():
        router.score.prototypes_ED.copy_(torch.ones(7, 16) + 1e-6 * torch.eye(16)[:7])
    decision = shifted.decide(alike, at())
    n = len(decision.chosen.experts_TK.unique())
    assert n == 1 and penalty(router, alike) == 0.0, "one active expert has nothing to be told from"
    spread = made(prototypes, site(top_k=7))
    with torch.no_grad():
        spread.score.prototypes_ED.copy_(torch.ones(7, 16))
    assert penalty(spread, inputs()) == pytest.approx(math.log(7), rel=1e-5)


def test_the_loss_is_over_the_experts_that_have_tokens():
    router, x = made(prototypes, site(top_k=1), tau=0.5), inputs(5)
    decision = router.decide(x, context(5))
    ids = decision.chosen.experts_TK[:, 0]
    here = ids.unique()
    means = torch.stack([x[ids == e].mean(0) for e in here])
    like = torch.nn.functional.cosine_similarity(router.score.prototypes_ED[here][:, None], means[None], dim=-1) / 0.5
    expected = torch.nn.functional.cross_entropy(like, torch.arange(len(here)))
    assert router.penalties(decision)["contrast"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert penalty(made(prototypes), inputs(), torch.ones(24, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize("options", [{"score": "tanh"}, {"tau": 0.0}])
def test_refused(options):
    with pytest.raises(InputError):
        made(prototypes, **options)
