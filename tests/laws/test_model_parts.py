"""Laws of every loss, tap, bank, mixer, block and architecture of the catalogue, each inside a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.method import load
from moestro.core.routing import Routing
from moestro.layers.config import MoEConfig, Part
from moestro.layers.decoder import build, site_of
from tests.laws.cards import cards

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, num_experts=8, top_k=2, d_expert=16, init_std=0.3)
PLACES = {
    "mixers": "mixer",
    "losses": "loss",
    "taps": "tap",
    "banks": "experts",
    "blocks": "block",
    "architectures": "architecture",
}
CARDS = {card.name: card for place, kind in PLACES.items() for card in cards(f"moestro.layers.{place}", kind)}
BANKS = [name for name, card in CARDS.items() if card.kind == "experts"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_with(name):
    """The tiny model with this part in it; a bank of its own size stands behind the routed experts."""
    part = Part(name)
    if name in BANKS and load(name, "experts")(site_of(CONFIG, 0, {})).num != CONFIG.num_experts:
        return replace(CONFIG, special=(part,))
    field = {"loss": "losses", "tap": "taps"}.get(CARDS[name].kind)
    return replace(CONFIG, **({field: (part,)} if field else {CARDS[name].kind: part}))


def tokens(seed=0, length=8):
    return torch.randint(0, CONFIG.vocabulary, (2, length), generator=torch.Generator().manual_seed(seed))


def rng():
    return torch.Generator().manual_seed(0)


def test_the_catalogue_is_walked():
    assert {"layers.losses.balance", "layers.taps.capacity", "layers.banks.stacked", "layers.blocks.routed"} <= set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_training_step_is_finite(name):
    model = build(config_with(name))
    out = model(tokens(), step=0, rng=rng())
    loss = torch.nn.functional.cross_entropy(out.logits_BTV.flatten(0, 1), tokens().flatten())
    (loss + sum(out.losses.values())).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)
    assert all(v.shape == () and bool(v.isfinite()) for v in out.losses.values())
    assert out.routings and all(isinstance(r, Routing) and r.tokens == 16 for r in out.routings)
    for controller in model.controllers():
        controller.after_step([out.light()], 0)


@pytest.mark.parametrize("name", CARDS)
def test_same_seed_same_model_and_state_survives(name):
    model, other = build(config_with(name)), build(replace(config_with(name), seed=1))
    with torch.no_grad():
        expected = build(config_with(name)).eval()(tokens()).logits_BTV
        assert torch.equal(model.eval()(tokens()).logits_BTV, expected)
        model.train()(tokens(), step=0, rng=rng())
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.eval()(tokens()).logits_BTV, model.eval()(tokens()).logits_BTV)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_change_no_earlier_logits(name, training):
    """One row, so that only time can leak."""
    if {"causal", "causal-in-training" if training else "causal-in-evaluation"} & set(CARDS[name].traits):
        pytest.skip("the card says: not causal")
    model = build(config_with(name)).train(training)
    early, late = tokens()[:1], tokens()[:1].clone()
    late[:, 5:] = tokens(seed=1)[:1, 5:]
    with torch.no_grad():
        a, b = (model(t, step=0, rng=rng()).logits_BTV[:, :5] for t in (early, late))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CARDS)
def test_evaluation_has_no_losses_and_changes_no_state(name):
    model = build(config_with(name)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model(tokens()).losses == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_is_the_weighted_sum_of_its_experts(name):
    bank = load(name, "experts")(site_of(CONFIG, 0, {}))
    x, g = torch.randn(10, 16), torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(bank.num, generator=g)[:2] for _ in range(10)]) if bank.num > 1 else torch.zeros(10, 1)
    ids, weights = ids.long(), torch.rand(ids.shape, generator=g)
    ids[3, 0] = -1
    ids[4] = -1
    weights = weights.masked_fill(ids < 0, 0.0)
    expected = torch.zeros(10, 16)
    for t, slot in (ids >= 0).nonzero().tolist():
        expected[t] += weights[t, slot] * bank.output(x[t : t + 1], int(ids[t, slot]))[0]
    torch.testing.assert_close(bank.run(x, Routing(ids, weights)), expected, rtol=1e-4, atol=1e-5)
    assert len(bank.costs) == len(bank.kinds) == bank.num
