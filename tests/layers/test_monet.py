"""Monet: einsums against all n^2 experts one by one, gates, and their reuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.blocks.monet import Gates, monet
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build
from tests.layers.sites import context, inputs, made, site

BOTH = pytest.mark.parametrize("decomposition", ["horizontal", "vertical"])


def block(decomposition, **options):
    made_one = made(monet, site(d_expert=6), n=8, k=3, heads=2, decomposition=decomposition, **options)
    with torch.no_grad():
        for parameter in made_one.experts.parameters():
            parameter.normal_(std=0.4)
    return made_one


@BOTH
def test_the_einsums_are_all_experts_one_by_one(decomposition):
    found, x = block(decomposition), inputs(5)
    (g1, g2), _ = found.gates(x)
    y = torch.zeros(5, 16)
    for i in range(8):
        for j in range(8):
            y += (g1[:, :, i] * g2[:, :, j]).sum(1, keepdim=True) * found.experts.one(x, i, j)
    torch.testing.assert_close(found.experts(x, g1, g2), y, rtol=1e-4, atol=1e-5)


@BOTH
def test_parameters_grow_with_n_and_experts_with_its_square(decomposition):
    small, large = (
        sum(p.numel() for p in made(monet, site(d_expert=6), n=n, k=2, decomposition=decomposition).experts.parameters())
        for n in (8, 16)
    )
    assert large == 2 * small


def test_gates_sum_to_one_and_about_k_are_kept():
    torch.manual_seed(0)
    gates = Gates(site(init_std=1.0), 64, 6, 2).train()
    (g1, g2), raw = gates(inputs(400))
    for g in (g1, g2):
        torch.testing.assert_close(g.sum(-1), torch.ones(400, 2))
        assert float((g > 0).sum(-1).float().mean()) == pytest.approx(6, rel=0.15)
        assert int((g > 0).sum(-1).min()) >= 1
    kept = g1 > 0
    torch.testing.assert_close(g1, raw[:, 0].masked_fill(~kept, float("-inf")).softmax(-1))


def test_at_least_one_is_kept_where_all_are_below_the_threshold():
    gates = Gates(site(), 64, 1, 2).eval()
    (g1, _), _ = gates(torch.zeros(3, 16))  # all scores equal the running mean
    assert bool(((g1 > 0).sum(-1) >= 1).all())


def test_layers_of_a_group_use_the_same_gates():
    config = MoEConfig(vocabulary=32, d_model=16, layers=5, heads=2, d_expert=4, block={"name": "monet", "n": 8, "groups": 4})
    model = build(config)
    seen = []
    for layer in model.layers:
        layer.block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    out = model(torch.randint(0, 32, (2, 8)), rng=torch.Generator())
    assert [layer.block.gates is None for layer in model.layers] == [False, True, True, True, False]
    assert len(out.routings) == 2 and all(torch.equal(seen[0][s], seen[i][s]) for i in (1, 2, 3) for s in (0, 1))
    assert not torch.equal(seen[0][0], seen[4][0])


def test_the_losses_are_the_rule():
    found, x = block("vertical", uniform=2.0, ambiguous=3.0), inputs()
    (g1, g2), _ = found.gates(x)
    out = found(x, context())
    use = -0.5 * sum((g.mean((0, 1)) + 1e-9).log().mean() for g in (g1, g2))
    sure = sum((1 - g.amax(-1)).mean() / 2 for g in (g1, g2))
    torch.testing.assert_close(out.losses["uniform"], 2.0 * use)
    torch.testing.assert_close(out.losses["ambiguous"], 3.0 * sure)


def test_training_leaks_through_the_norm_and_evaluation_does_not():
    """Later tokens move the batch's mean, and with it who is above the threshold."""
    config = MoEConfig(vocabulary=32, d_model=16, layers=1, heads=2, d_expert=8, block={"name": "monet", "n": 16}, init_std=0.5)
    tokens = torch.randint(0, 32, (1, 12), generator=torch.Generator().manual_seed(0))
    later = tokens.clone()
    later[:, 6:] = 7
    for training in (True, False):
        model = build(config).train(training)
        a, b = (model(t, rng=torch.Generator()).logits_BTV[:, :6] for t in (tokens, later))
        assert torch.allclose(a, b, atol=1e-6) != training


@pytest.mark.parametrize("options", [{"k": 40.0}, {"decomposition": "diagonal"}, {"heads": 0}])
def test_refused(options):
    with pytest.raises(InputError):
        made(monet, **options)


def test_vertical_needs_even_widths():
    with pytest.raises(InputError):
        made(monet, replace(site(), d_expert=5))
