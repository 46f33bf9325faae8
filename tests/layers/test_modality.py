"""Modality experts: equal copies are the dense model; text and images do not touch each other's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, kv_heads=1, d_expert=8, architecture="modality", init_std=0.3)
TOKENS = torch.randint(0, 32, (3, 10), generator=torch.Generator().manual_seed(0))
TEXT_ONLY = TOKENS % 14


def spread_images(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".of.1." in name:
                parameter.add_(torch.randn(parameter.shape))


def test_equal_copies_are_the_dense_model_for_any_types():
    model = build(CONFIG)
    plain = build(replace(CONFIG, architecture="decoder", dense_layers=(0, 1)))
    state = {name.replace(".of.0", ""): value for name, value in model.state_dict().items() if ".of.1." not in name}
    state = {name.replace(".feed_forward.", ".block.feed_forward."): value for name, value in state.items()}
    plain.load_state_dict(state)
    torch.testing.assert_close(model(TOKENS).logits_BTV, plain(TOKENS).logits_BTV)
    out = model(TOKENS)
    assert torch.equal(out.routings[0].experts_TK[:, 0], ((TOKENS >= 14) & (TOKENS < 31)).flatten().long())
    assert set(out.routings[0].experts_TK.unique().tolist()) == {0, 1}


def test_image_weights_never_change_pure_text_and_change_mixed_rows():
    model = build(CONFIG).eval()
    text, mixed = model(TEXT_ONLY).logits_BTV, model(TOKENS).logits_BTV
    spread_images(model)
    assert torch.equal(model(TEXT_ONLY).logits_BTV, text) and not torch.allclose(model(TOKENS).logits_BTV, mixed)


def test_training_images_only_leaves_texts_logits_bit_for_bit():
    model = build(replace(CONFIG, architecture={"name": "modality", "train": "image"}))
    before = model.eval()(TEXT_ONLY).logits_BTV
    optimiser = torch.optim.AdamW(model.parameters(), 0.05)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model.train()(TOKENS).logits_BTV.flatten(0, 1), TOKENS.roll(-1, 1).flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.equal(model.eval()(TEXT_ONLY).logits_BTV, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".of.1." in n
    }


def test_images_see_themselves_whole_where_asked_and_text_stays_causal():
    row = torch.tensor([[1, 2, 20, 21, 22, 3, 4, 25, 26]])
    seen = build(replace(CONFIG, architecture={"name": "modality", "both_ways": True})).visible(row, None)[0, 0]
    expected = torch.ones(9, 9, dtype=torch.bool).tril()
    expected[2:5, 2:5] = True
    expected[7:, 7:] = True
    assert torch.equal(seen, expected)
    cut = build(replace(CONFIG, architecture={"name": "modality", "both_ways": True})).visible(
        row, (torch.arange(9) > 3).long()[None]
    )
    assert not bool(cut[0, 0, 3, 4]) and bool(cut[0, 0, 2, 3])
    assert build(CONFIG).visible(row, None) is None


def test_refused():
    for options in ({"image": [3]}, {"train": "text"}):
        with pytest.raises(InputError):
            build(replace(CONFIG, architecture={"name": "modality", **options}))
