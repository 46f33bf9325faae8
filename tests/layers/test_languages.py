"""Mixture of language experts: the blend, one decision for all layers, and the recogniser's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.languages import languages
from tests.layers.sites import context, inputs, made, site

CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=3, heads=2, num_experts=4, top_k=2, d_expert=8, router="languages", init_std=0.3
)
TOKENS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))


def test_two_experts_are_active_and_weighed_by_the_reliability():
    routing = made(languages)(inputs(), context())
    p = routing.logits_TE[:, :7].softmax(-1)
    assert torch.equal(routing.experts_TK, torch.stack((p.argmax(-1), torch.full((24,), 7)), 1))
    torch.testing.assert_close(routing.weights_TK, torch.stack((p.amax(-1), 1 - p.amax(-1)), 1))


@pytest.mark.parametrize("sure", [True, False])
def test_certainty_is_the_language_expert_alone_and_doubt_mostly_the_agnostic_one(sure):
    router = made(languages)
    with torch.no_grad():
        router.score.recogniser.maps[-1].weight.zero_()
        router.score.recogniser.maps[-1].bias.copy_(torch.tensor([0.0] * 6 + [200.0 if sure else 0.0]))
    weights = router(inputs(), context()).weights_TK
    expected = torch.tensor([1.0, 0.0] if sure else [1 / 7, 6 / 7]).expand(24, 2)
    torch.testing.assert_close(weights, expected)


def test_all_layers_agree_and_one_recogniser_is_trained():
    model = build(CONFIG)
    domain = torch.tensor([0, 1]).repeat_interleave(8)
    out = model(TOKENS, given={"domain_T": domain})
    first = out.routings[0]
    assert all(torch.equal(first.experts_TK, r.experts_TK) and torch.equal(first.weights_TK, r.weights_TK) for r in out.routings)
    assert len({id(layer.block.router.score.recogniser) for layer in model.layers}) == 1
    expected = 0.1 * torch.nn.functional.cross_entropy(first.logits_TE[:, :3], domain)
    torch.testing.assert_close(out.losses["identify"], expected)


def test_what_each_level_reads():
    x = inputs()
    later = x.clone()
    later[4:8] = 5.0  # the end of the first sequence
    for level, changed in (("prefix", [4, 5, 6, 7]), ("sequence", list(range(8))), ("token", [4, 5, 6, 7])):
        router = made(languages, level=level)
        a, b = (router(v, context()).logits_TE for v in (x, later))
        assert (a - b).abs().amax(1).gt(1e-5).nonzero()[:, 0].tolist() == changed
    router = made(languages, level="prefix")
    torch.testing.assert_close(router(x, context()).logits_TE[5, :7], router.score.recogniser.maps(x[:6].mean(0)))
    whole = made(languages, level="sequence")(x, context())
    assert all(len(whole.experts_TK[8 * i : 8 * i + 8, 0].unique()) == 1 for i in range(3)), "one decision per sequence"


def test_refused():
    with pytest.raises(InputError):
        made(languages, level="word")
    with pytest.raises(InputError):
        languages(site(num_experts=1))
    with pytest.raises(InputError, match="language 3"):
        build(replace(CONFIG))(TOKENS, given={"domain_T": torch.full((16,), 3)})
