"""DeepSeek-V3's node limit as traffic, and the gate without limit and bias."""

from __future__ import annotations

import torch

from moestro.layers.routers.deepseek_v3 import deepseek_v3
from moestro.layers.routers.topk import topk
from tests.layers.sites import chosen, context, dense, inputs, made, site

WIDE = site(num_experts=64, top_k=8)


def nodes_per_token(kept):
    """Mean number of distinct groups of 8 experts that a token's 8 experts are on."""
    routing = made(deepseek_v3, WIDE, groups=8, kept=kept)(inputs(2000), context(2000))
    return chosen(routing, 64).unflatten(1, (8, 8)).any(-1).sum(1).float()


def test_the_limit_cuts_the_nodes_that_a_token_touches():
    free, limited = nodes_per_token(8), nodes_per_token(4)
    # Eight draws without replacement from 64 touch 8 (1 - C(56, 8) / C(64, 8)) = 5.43 of 8 nodes.
    assert abs(float(free.mean()) - 5.43) < 0.3
    assert int(limited.max()) <= 4 and int((free > 4).sum()) > 1000


def test_no_limit_and_no_bias_is_sigmoid_top_k_renormalised():
    x = inputs()
    plain = made(topk, WIDE, score="sigmoid")(x, context())
    for groups, kept in ((1, 1), (8, 8)):
        found = made(deepseek_v3, WIDE, groups=groups, kept=kept, scale=1.0)(x, context())
        assert torch.equal(dense(found, 64), dense(plain, 64))
