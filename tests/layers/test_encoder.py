"""The encoder reads in both directions, within a document."""

from __future__ import annotations

from dataclasses import replace

import torch

from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build

CONFIG = MoEConfig(
    vocabulary=32, d_model=16, layers=2, heads=2, num_experts=4, top_k=2, d_expert=8, architecture="encoder", init_std=0.3
)


def test_later_tokens_are_read_but_not_those_of_another_document():
    model = build(CONFIG).eval()
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 32
    assert not torch.allclose(model(tokens).logits_BTV[:, :5], model(later).logits_BTV[:, :5], atol=1e-3)
    segments = (torch.arange(8) >= 6).long().expand(2, 8)
    a, b = (model(t, segment_BT=segments).logits_BTV[:, :6] for t in (tokens, later))
    torch.testing.assert_close(a, b)


def test_a_single_token_meets_the_plain_decoder():
    model, plain = build(CONFIG).eval(), build(replace(CONFIG, architecture="decoder")).eval()
    plain.load_state_dict(model.state_dict())
    token = torch.tensor([[3], [5]])
    torch.testing.assert_close(model(token).logits_BTV, plain(token).logits_BTV)
