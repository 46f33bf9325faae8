"""Union-of-Experts: all slices are the dense layer, all heads are plain attention, and what is selected in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec
from moestro.core.routing import RouteContext
from moestro.layers.block import MoEBlock
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build, rotary_table
from moestro.layers.experts import Stacked
from moestro.layers.mixers.attention import Attention
from moestro.layers.mixers.selective_heads import SelectiveHeads
from moestro.layers.routers.union import union
from tests.layers.sites import chosen, context, inputs, made, site

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=4, num_experts=4, top_k=2, d_expert=6, init_std=0.3)


@pytest.mark.parametrize("gated", [True, False])
def test_all_slices_of_a_dense_layer_are_the_dense_layer(gated):
    dense, slices = Stacked(1, ExpertSpec(16, 24, "silu", gated), std=0.3), Stacked(4, ExpertSpec(16, 6, "silu", gated))
    with torch.no_grad():
        rows = dense.gate_up_EFD[0].view(2 if gated else 1, 4, 6, 16)
        slices.gate_up_EFD.copy_(rows.transpose(0, 1).flatten(1, 2))
        slices.down_EDF.copy_(dense.down_EDF[0].view(16, 4, 6).transpose(0, 1))
    block = MoEBlock(made(union, site(num_experts=4, top_k=4), share=1.0), slices)
    torch.testing.assert_close(block(inputs(), context()).y_TD, dense.output(inputs(), 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_an_expert_takes_its_share_of_each_sequence_among_those_that_want_it(share):
    router, x = made(union, share=share), inputs(48)
    routing = router(x, context(48))
    mask, free = chosen(routing), chosen(router(x, context(48, training=False)))
    assert bool((free.sum(1) == 2).all()) and bool((free | ~mask).all()), "only what a token has among its best"
    probs = routing.probs_TE.detach()
    for b in range(6):
        rows = slice(8 * b, 8 * b + 8)
        for e in range(8):
            wanted = free[rows, e].nonzero()[:, 0]
            best = wanted[probs[rows, e][wanted].argsort(descending=True)][: int(8 * share)]
            assert sorted(best.tolist()) == mask[rows, e].nonzero()[:, 0].tolist()


def test_the_selection_of_positions_sees_later_tokens_and_evaluation_does_not():
    router, x = made(union, share=0.25), inputs(8)
    later = x.clone()
    later[4:] = 20 * inputs(8, seed=1)[4:]
    same = [
        torch.equal(*(chosen(router(v, context(8, training=training)))[:4] for v in (x, later))) for training in (True, False)
    ]
    assert same == [False, True]


def test_weights_are_one_and_the_gate_learns():
    routing = made(union)(inputs(), context())
    assert set(routing.weights_TK.detach().unique().tolist()) <= {0.0, 1.0}
    assert routing.weights_TK.requires_grad


def heads(k):
    torch.manual_seed(0)
    plain, selective = Attention(CONFIG), SelectiveHeads(CONFIG, k)
    with torch.no_grad():
        parts = [p.weight.view(4, 4, 16) for p in (plain.q_proj, plain.k_proj, plain.v_proj)]
        selective.qkv_HWD.copy_(torch.cat(parts, 1))
        selective.out_HDW.copy_(plain.o_proj.weight.view(16, 4, 4).transpose(0, 1))
    return plain, selective


def rows():
    return inputs(24).view(3, 8, 16), rotary_table(torch.arange(8).expand(3, 8), 4, 10000.0)


@pytest.mark.parametrize("masked", [False, True])
def test_all_heads_are_plain_attention(masked):
    plain, selective = heads(4)
    x, rotary = rows()
    mask = torch.ones(8, 8, dtype=torch.bool).tril() & ~(torch.arange(8)[:, None] - torch.arange(8) > 3) if masked else None
    mask = None if mask is None else mask[None, None]
    torch.testing.assert_close(selective(x, rotary, mask), plain(x, rotary, mask), rtol=1e-5, atol=1e-6)


def test_a_head_attends_among_its_tokens_only():
    plain, selective = heads(2)
    x, rotary = rows()
    of = torch.zeros(3, 8, 4).scatter(2, selective.gate(x).topk(2, -1).indices, 1.0).bool()
    total = torch.zeros_like(x)
    for h in range(4):
        alone = Attention(CONFIG)
        alone.load_state_dict(plain.state_dict())
        with torch.no_grad():
            alone.o_proj.weight.view(16, 4, 4)[:, [i for i in range(4) if i != h]] = 0
        seen = of[:, None, None, :, h] & torch.ones(8, 8, dtype=torch.bool).tril() | torch.eye(8, dtype=torch.bool)
        total += alone(x, rotary, seen) * of[..., h, None]
    torch.testing.assert_close(selective(x, rotary, None), total, rtol=1e-4, atol=1e-5)
    selective(x, rotary, None).square().sum().backward()
    assert float(selective.gate.weight.grad.abs().sum()) > 0


def test_both_together_train_and_are_causal_in_evaluation():
    model = build(replace(CONFIG, mixer="selective_heads", router="union")).eval()
    tokens = torch.randint(0, 32, (1, 8), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[:, 5:] = 3
    torch.testing.assert_close(model(tokens).logits_BTV[:, :5], model(later).logits_BTV[:, :5])


def test_refused():
    with pytest.raises(InputError):
        made(union, share=0.0)
    for change in ({"kv_heads": 2}, {"mixer": {"name": "selective_heads", "k": 5}}):
        with pytest.raises(InputError):
            build(replace(CONFIG, **{"mixer": "selective_heads", **change}))
    assert RouteContext().sequence_T is None and made(union)(inputs(4), RouteContext(training=True)).tokens == 4
