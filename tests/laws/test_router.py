"""Laws of every router, over the whole catalogue of the kind, in training and in evaluation.

A trait on a method's card switches a law off: 'law' in both modes, 'law-in-training' in training only.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.core.method import load
from moestro.core.routing import EMPTY, RouteContext, Tap
from moestro.layers.block import Output
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build, controllers, site_of
from moestro.layers.experts import Stacked, spec_at
from tests.laws.cards import cards

CARDS = {card.name: card for card in cards("moestro.layers.routers", "router")}
MODES = ("training", "evaluation")
LAWS = {"relabel", "batch", "causal", "gradient", "deterministic", "ban"}
SEQUENCES, LENGTH, E = 3, 8, 8
TOKENS = SEQUENCES * LENGTH
CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=2, heads=2, num_experts=E, top_k=2, d_expert=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def router_of(name, seed=0, spread=0.5):
    """A router at the second of two layers, its parameters far from zero so that routing spreads. The experts are always the same."""
    site = site_of(CONFIG, 1, {})
    torch.manual_seed(0)
    bank = Stacked(E, spec_at(site), std=spread)
    torch.manual_seed(seed)
    router = load(name, "router")(replace(site, experts=bank))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(std=spread)
    return router


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG.vocabulary, (TOKENS,), generator=g)
    return torch.randn(TOKENS, CONFIG.d_model, generator=g), ids


def context(ids, training, rng=0, first=0):
    """first: the place of ids[0] in the batch."""
    place = torch.arange(first, first + len(ids))
    return RouteContext(1, training, 3, ids, place // LENGTH, place % LENGTH, torch.Generator().manual_seed(rng))


def route(router, x_TD, ids, mode, rng=0, first=0):
    training = mode == "training"
    router.train(training)
    return router(x_TD, context(ids, training, rng, first))


def dense(routing, experts=E):
    """weights_TE, to compare routings whatever the order of their slots; NaN where not routed."""
    out = torch.full((routing.tokens, experts + 1), float("nan"))
    out.scatter_(1, routing.experts_TK.masked_fill(routing.experts_TK < 0, experts), routing.weights_TK.detach())
    return out[:, :experts]


def same(a, b):
    torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-5, atol=1e-6)


def holds(name, law, mode=None):
    traits = CARDS[name].traits
    return law not in traits and f"{law}-in-{mode}" not in traits


def needs(name, law, mode=None):
    if not holds(name, law, mode):
        pytest.skip(f"the card says: no {law}")


@pytest.fixture(params=sorted(CARDS))
def name(request):
    return request.param


def test_the_catalogue_is_walked():
    assert {"layers.routers.topk", "layers.routers.switch"} <= set(CARDS)


def test_traits_name_laws(name):
    allowed = LAWS | {f"{law}-in-{mode}" for law in LAWS for mode in MODES}
    assert set(CARDS[name].traits) <= allowed


@pytest.mark.parametrize("mode", MODES)
def test_routing_is_well_formed(name, mode):
    x, ids = inputs()
    found = router_of(name)
    router_out = route(found, x, ids, mode)
    experts, weights = router_out.experts_TK, router_out.weights_TK
    assert experts.dtype == torch.int64 and experts.shape == weights.shape and experts.shape[0] == TOKENS
    assert int(experts.min()) >= EMPTY and int(experts.max()) < E
    assert bool((weights[experts < 0] == 0).all()) and bool(weights.isfinite().all())
    for row in experts.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
    assert router_out.logits_TE.shape == router_out.probs_TE.shape == (TOKENS, E)
    assert int((experts >= 0).sum()) > 0


@pytest.mark.parametrize("mode", MODES)
def test_relabelling_experts_relabels_the_routing(name, mode):
    needs(name, "relabel", mode)
    x, ids = inputs()
    router = router_of(name)
    perm = torch.randperm(E, generator=torch.Generator().manual_seed(5))
    renamed = router.tapped(Tap("logits", lambda z, ctx: z[:, perm]))
    same(dense(route(renamed, x, ids, mode)), dense(route(router, x, ids, mode))[:, perm])


@pytest.mark.parametrize("mode", MODES)
def test_splitting_a_batch_changes_nothing(name, mode):
    needs(name, "batch", mode)
    x, ids = inputs()
    router, cut = router_of(name), LENGTH
    whole = dense(route(router, x, ids, mode))
    same(dense(route(router, x[:cut], ids[:cut], mode)), whole[:cut])
    same(dense(route(router, x[cut:], ids[cut:], mode, first=cut)), whole[cut:])


@pytest.mark.parametrize("mode", MODES)
def test_later_tokens_change_nothing_earlier(name, mode):
    needs(name, "causal", mode)
    router, cut = router_of(name), LENGTH + 3
    x, ids = inputs()
    other_x, other_ids = inputs(seed=1)
    later_x, later_ids = torch.cat((x[:cut], 3 * other_x[cut:])), torch.cat((ids[:cut], other_ids[cut:]))
    same(dense(route(router, later_x, later_ids, mode))[:cut], dense(route(router, x, ids, mode))[:cut])


def test_gradient_reaches_the_gate(name):
    x, ids = inputs()
    router = router_of(name)
    routing = route(router, x, ids, "training")
    score = torch.randn(TOKENS, E, generator=torch.Generator().manual_seed(2))
    chosen = score.gather(1, routing.experts_TK.clamp_min(0))
    total = (routing.weights_TK * chosen).sum()
    learned = [p for p in router.parameters() if p.requires_grad]
    if holds(name, "gradient"):
        grads = [g for g in torch.autograd.grad(total, learned, allow_unused=True) if g is not None]
        assert sum(float(g.abs().sum()) for g in grads) > 0 and all(bool(g.isfinite().all()) for g in grads)
    else:
        assert not total.requires_grad or not learned


@pytest.mark.parametrize("mode", MODES)
def test_same_generator_same_routing(name, mode):
    x, ids = inputs()
    router = router_of(name)
    first = dense(route(router, x, ids, mode))
    torch.manual_seed(99)  # the global generator must not matter
    same(dense(route(router_of(name), x, ids, mode)), first)


def test_evaluation_draws_nothing(name):
    needs(name, "deterministic", "evaluation")
    x, ids = inputs()
    router = router_of(name)
    same(dense(route(router, x, ids, "evaluation", rng=1)), dense(route(router, x, ids, "evaluation", rng=2)))


@pytest.mark.parametrize("mode", MODES)
def test_a_banned_expert_is_never_chosen_and_the_original_is_untouched(name, mode):
    needs(name, "ban", mode)
    x, ids = inputs()
    router = router_of(name)
    before = dense(route(router, x, ids, mode))
    busiest = int((~before.isnan()).sum(0).argmax())
    banned = router.tapped(Tap("choice", lambda s, ctx: s.index_fill(1, torch.tensor([busiest]), float("-inf"))))
    assert bool(dense(route(banned, x, ids, mode))[:, busiest].isnan().all())
    same(dense(route(router, x, ids, mode)), before)


def test_state_survives_saving(name):
    """After a training step, buffers included, another router that loads the state routes the same in evaluation."""
    x, ids = inputs()
    router = router_of(name)
    for step in range(3):
        routing = route(router, x, ids, "training", rng=step)
        for controller in controllers(router):
            controller.after_step([Output(x, {}, (routing, routing))], step)
    state = {key: value.clone() for key, value in router.state_dict().items()}
    other = router_of(name, seed=7)
    other.load_state_dict(state)
    same(dense(route(other, x, ids, "evaluation")), dense(route(router, x, ids, "evaluation")))


def test_losses_are_finite_scalars_with_gradient(name):
    x, ids = inputs()
    router = router_of(name).train()
    decision = router.decide(x, context(ids, True))
    for loss in router.penalties(decision).values():
        assert loss.shape == () and bool(loss.isfinite())
    total = sum(router.penalties(decision).values(), torch.zeros(()))
    learned = [p for p in router.parameters() if p.requires_grad]
    if total.requires_grad and learned:
        assert all(g is None or bool(g.isfinite().all()) for g in torch.autograd.grad(total, learned, allow_unused=True))


@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(name, mode):
    router = router_of(name)
    x, ids = inputs()
    found = route(router, x[:0], ids[:0], mode)
    assert found.experts_TK.shape[0] == found.weights_TK.shape[0] == 0
    decision = router.decide(x[:0], context(ids[:0], mode == "training"))
    assert mode == "evaluation" or all(bool(loss.isfinite()) for loss in router.penalties(decision).values())


def test_nan_is_refused(name):
    needs(name, "gradient")  # a router without a learned score has no logits that x could spoil
    x, ids = inputs()
    x[3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        route(router_of(name), x, ids, "evaluation")


def test_inside_a_model(name):
    """One training step is finite and reaches the experts; evaluation has no losses; two layers route."""
    config = replace(CONFIG, router=name)
    model = build(config)
    tokens = torch.randint(0, CONFIG.vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    out = model(tokens, step=0, rng=torch.Generator().manual_seed(0))
    total = torch.nn.functional.cross_entropy(out.logits_BTV.flatten(0, 1), tokens.flatten()) + sum(out.losses.values())
    total.backward()
    assert len(out.routings) == 2 and out.logits_BTV.shape == (2, 8, 32)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert any("experts" in n and float(g.abs().sum()) > 0 for n, g in grads.items())
    assert model.eval()(tokens).losses == {}
