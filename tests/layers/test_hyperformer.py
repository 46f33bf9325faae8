"""HyperFormer's feed-forward: equal experts are the dense layer, two small ReLU experts per token."""

from __future__ import annotations

import torch

from moestro.layers.blocks.hyperformer import hyperformer
from tests.layers.sites import context, dense, inputs, made, site


def test_all_and_equal_experts_are_one_dense_layer():
    block, x = made(hyperformer, site(top_k=8)), inputs()
    with torch.no_grad():
        for w in block.experts.parameters():
            w.copy_(w[:1].expand_as(w))
        block.experts.gate_up_EF.fill_(0.3)
        block.experts.down_ED.fill_(-0.2)
    w = block.experts.weights(0)
    expected = (x @ w.up_FD.T + w.up_F).relu() @ w.down_DF.T + w.down_D
    torch.testing.assert_close(block(x, context()).y_TD, expected, rtol=1e-4, atol=1e-5)


def test_two_scores_share_the_weight_and_nothing_balances():
    block = made(hyperformer)
    out = block(inputs(), context())
    routing = out.routings[0]
    best = routing.logits_TE.topk(2, -1)
    torch.testing.assert_close(dense(routing).sum(1), torch.ones(24))
    torch.testing.assert_close(routing.weights_TK, best.values.softmax(-1))
    assert out.losses == {}
