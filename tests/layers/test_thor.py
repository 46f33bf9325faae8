"""THOR: random experts, and the objective that makes them agree."""

from __future__ import annotations

import torch

from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from moestro.layers.routers.thor import thor
from moestro.train.data.stream import Batch
from moestro.train.objective import cross_entropy, run
from moestro.train.objectives.consistency import Consistency, disagreement
from tests.layers.sites import context, inputs, made


def test_training_uses_one_expert_for_the_batch_and_all_in_turn():
    router = made(thor)
    drawn = [router(inputs(), context(seed=seed)).experts_TK.unique() for seed in range(400)]
    assert all(len(d) == 1 for d in drawn)
    share = torch.bincount(torch.cat(drawn), minlength=8) / 400
    assert float((share - 1 / 8).abs().max()) < 4 * (1 / 8 * 7 / 8 / 400) ** 0.5
    assert not list(router.parameters()) and not list(router.losses)


def test_evaluation_draws_per_token_per_sequence_or_takes_all():
    x = inputs(4000)
    token = made(thor)(x, context(4000, training=False)).experts_TK
    share = torch.bincount(token[:, 0], minlength=8) / 4000
    assert float((share - 1 / 8).abs().max()) < 4 * (1 / 8 * 7 / 8 / 4000) ** 0.5
    rows = made(thor, inference="sequence")(x, context(4000, training=False)).experts_TK.view(500, 8)
    assert bool((rows == rows[:, :1]).all()) and len(rows.unique()) == 8
    everyone = made(thor, inference="all")(x, context(4000, training=False))
    assert everyone.experts_TK.sort(1).values[7].tolist() == list(range(8))
    assert bool((everyone.weights_TK == 1 / 8).all())


def test_disagreement_is_symmetric_zero_for_equals_and_written_out():
    a, b = inputs(5, 7), inputs(5, 7, seed=1)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    expected = 0.5 * (((p - q) * (p.log() - q.log())).sum(-1)).mean()
    torch.testing.assert_close(disagreement(a, b).double(), expected, rtol=1e-5, atol=0)
    assert disagreement(a, b) == disagreement(b, a) > 0 == disagreement(a, a)
    far = torch.tensor([[500.0, 0.0]])
    assert bool(disagreement(far, -far).isfinite())


CONFIG = MoEConfig(vocabulary=16, d_model=16, layers=2, heads=2, num_experts=4, top_k=1, d_expert=32, router="thor", init_std=0.1)


def batch(seed):
    """The next token is the one before, times 5 plus 3, or half of the time any: few such sequences are memorised, not learned."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 16, (16, 1), generator=g)
    for _ in range(6):
        ruled, free = (tokens[:, -1:] * 5 + 3) % 16, torch.randint(0, 16, (16, 1), generator=g)
        tokens = torch.cat((tokens, torch.where(torch.rand(16, 1, generator=g) < 0.5, ruled, free)), 1)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(16, dtype=torch.int64))


def test_the_objective_is_two_passes_and_what_they_disagree_on():
    model, b = build(CONFIG), batch(0)
    found = Consistency(alpha=3.0, smoothing=0.0)(model, b, 0, torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(5)
    one, two = run(model, b, 0, rng), run(model, b, 0, rng)
    apart = disagreement(one.logits_BTV.flatten(0, 1), two.logits_BTV.flatten(0, 1))
    torch.testing.assert_close(found.loss, cross_entropy(one.logits_BTV, b) + cross_entropy(two.logits_BTV, b) + 3 * apart)
    assert len(found.outputs) == 2


def spread_after(alpha):
    """Standard deviation of held-out loss over draws of one expert per layer, after training on few sequences."""
    model, objective = build(CONFIG), Consistency(alpha=alpha, smoothing=0.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(50):
        optimiser.zero_grad()
        objective(model, batch(step % 4), step, torch.Generator().manual_seed(step)).loss.backward()
        optimiser.step()
    with torch.no_grad():  # a training pass draws one expert for the whole batch
        losses = [run(model, batch(99), 0, torch.Generator().manual_seed(s)).logits_BTV for s in range(12)]
        return float(torch.stack([cross_entropy(logits, batch(99)) for logits in losses]).std())


def test_consistency_shrinks_the_spread_over_draws():
    assert spread_after(5.0) < 0.5 * spread_after(0.0)
