"""ReXMoE: the pool of adjacent layers, opened by the schedule; with a local mask it begins as the plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moestro.core.errors import InputError
from moestro.layers.architectures.rexmoe import Progressive
from moestro.layers.block import MoEBlock
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import build

CONFIG = MoEConfig(vocabulary=32, d_model=16, layers=4, heads=2, num_experts=4, top_k=2, d_expert=8, init_std=0.3)
TOKENS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))


def reused(**options):
    return build(replace(CONFIG, architecture={"name": "rexmoe", "begin": 10, "end": 30, **options}))


def test_the_schedule_is_the_papers():
    tap = Progressive(4, 12, 0, 10, 30, "random", 0)
    assert [tap.count(t) for t in (0, 10, 15, 20, 30, 31, 99)] == [4, 4, 6, 8, 12, 12, 12]
    counts = [tap.count(t) for t in range(50)]
    assert counts == sorted(counts) and [int(tap.allowed(t, True).sum()) for t in range(50)] == counts
    assert not torch.equal(tap.allowed(5, True), tap.allowed(6, True)), "drawn anew"
    assert torch.equal(tap.allowed(5, True), Progressive(4, 12, 0, 10, 30, "random", 0).allowed(5, True)), (
        "the same on every rank"
    )
    assert bool(tap.allowed(0, False).all()), "evaluation may use all"


def test_experts_are_shared_and_only_routers_grow():
    plain, model = build(CONFIG), reused()
    grown = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert grown == 4 * 4 * 16, "four routers of four more rows"
    blocks = [m for m in model.modules() if isinstance(m, MoEBlock)]
    first, second, third = (list(block.experts.banks) for block in blocks[:3])
    assert first[0] is second[0] and first[1] is second[1] and third[0] is not first[0]


@pytest.mark.parametrize("step", [0, 5, 20, 40])
def test_masked_experts_get_no_token(step):
    model = reused().train()
    out = model(TOKENS, step=step, rng=torch.Generator().manual_seed(0))
    for block, routing in zip((m for m in model.modules() if isinstance(m, MoEBlock)), out.routings, strict=True):
        tap = block.router.taps[-1].fn
        assert set(routing.experts_TK.unique().tolist()) <= set(tap.allowed(step, True).nonzero().flatten().tolist())
        assert int((routing.experts_TK >= 0).sum()) == 32


@pytest.mark.parametrize("training", [True, False])
def test_its_own_experts_only_is_the_plain_model(training):
    model, plain = reused(mask="local").train(training), build(CONFIG).train(training)
    state = model.state_dict()
    with torch.no_grad():
        for name, target in plain.state_dict().items():
            parts = name.split(".")
            if ".experts." in name:
                layer = int(parts[1])
                target.copy_(state[name.replace(".experts.", f".experts.banks.{layer % 2}.")])
            elif name.endswith("gate.weight"):
                own = 4 * (int(parts[1]) % 2)
                target.copy_(state[name][own : own + 4])
            else:
                target.copy_(state[name])
    torch.testing.assert_close(plain(TOKENS, step=3).logits_BTV, model(TOKENS, step=3).logits_BTV)


def test_evaluation_follows_the_saved_count():
    model = reused(mask="local")
    tap = next(model.controllers())
    tap.after_step([], 19)
    assert int(tap.opened) == 6 and int(tap.allowed(0, False).sum()) == 6
    other = reused(mask="local")
    other.load_state_dict(model.state_dict())
    assert int(next(other.controllers()).opened) == 6


def test_a_last_group_may_be_smaller():
    model = build(replace(CONFIG, layers=3, architecture={"name": "rexmoe", "reuse": 2}))
    assert [r.logits_TE.shape[1] for r in model(TOKENS).routings] == [8, 8, 4]


@pytest.mark.parametrize("options", [{"reuse": 0}, {"begin": 30}, {"mask": "none"}])
def test_refused(options):
    with pytest.raises(InputError):
        reused(**options)
