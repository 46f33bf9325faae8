"""The loop: it learns, its parts are what they claim, and what goes in comes out of the log."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from moestro.core.errors import MoestroError
from moestro.layers.decoder import build
from moestro.train.log import read
from moestro.train.objective import Outcome, Phase, cross_entropy, make, run


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in read(folder) if "loss" in entry]


def test_it_learns_and_says_so(make_config, make_loop):
    loop = make_loop(make_config(steps=60, optimiser={"rate": 0.02}, evaluate_every=30))
    summary = loop.run()
    entries = read(loop.folder)
    evaluations = [e["evaluation"] for e in entries if "evaluation" in e]
    assert [e["step"] for e in entries if "evaluation" in e] == [0, 30, 60]
    assert evaluations[0]["loss"] == pytest.approx(math.log(257), abs=0.1)
    assert evaluations[2]["loss"] < evaluations[1]["loss"] < evaluations[0]["loss"] - 2
    assert set(evaluations[2]["domains"]) == {"count", "letters", "digits"}
    assert summary["evaluation"] == evaluations[2] and summary["steps"] == 60 and summary["tokens"] == 60 * 4 * 16
    assert summary["last"]["active"] == 2.0 and summary["last"]["dropped"] == 0.0 and summary["last"]["unrouted"] == 0.0
    assert len(losses(loop.folder)) == 60 and loop.resume() is not None


def test_bits_per_byte_of_bytes_are_bits_per_token(make_config, make_loop):
    found = make_loop(make_config()).evaluate()
    byte_share = sum(d.bytes for d in make_loop(make_config()).stream.tokens.domains) / sum(
        d.tokens for d in make_loop(make_config()).stream.tokens.domains
    )
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) / byte_share, rel=1e-3)


def test_accumulated_micro_batches_are_one_batch(make_config, make_loop, tmp_path):
    """With a loss that is a mean over tokens (balance off), the split changes nothing but the order of the sums."""
    router = {"name": "topk", "balance": 0.0}
    whole = make_loop(make_config(model={"router": router}, batch=8), tmp_path / "a")
    parts = make_loop(make_config(model={"router": router}, batch=8, micro_batch=2), tmp_path / "b")
    assert parts.passes == 4 and whole.passes == 1
    whole.run(), parts.run()
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        assert torch.allclose(a, b, atol=2e-4)


def test_one_step_is_adamw_written_out(make_config, make_loop):
    config = make_config(optimiser={"rate": 0.01, "decay": 0.3, "clip": 0.5}, rate={"warmup": 0.0, "shape": "constant"})
    loop = make_loop(config)
    twin = build(config.model).train()
    outcome = make(config.objective, "objective")(twin, loop.stream.batch(0, 4), 0, torch.Generator())
    outcome.loss.backward()
    entry = loop.train_step()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters()))
    assert entry["loss"] == pytest.approx(outcome.loss.item(), rel=1e-6) and entry["norm"] == pytest.approx(norm, rel=1e-5)
    shrink = min(1.0, 0.5 / (norm + 1e-6))
    for old, new in zip(twin.parameters(), loop.parameters, strict=True):
        g = old.grad * shrink
        moved = old * (1 - 0.01 * (0.3 if old.ndim > 1 else 0.0)) - 0.01 * g / (g.abs() + 1e-8)
        assert torch.allclose(new, moved, atol=1e-6)


def test_the_loss_is_cross_entropy_and_the_auxiliary_losses(make_config, make_loop):
    loop = make_loop(make_config(model={"losses": [{"name": "z", "weight": 0.1}]}))
    batch = loop.stream.batch(0, 4)
    for smoothing in (0.0, 0.2):
        objective = make(make_config(objective={"name": "next_token", "smoothing": smoothing}).objective, "objective")
        outcome = objective(loop.module.train(), batch, 0, torch.Generator())
        logp = run(loop.module, batch, 0).logits_BTV.log_softmax(-1)
        picked = logp.gather(-1, batch.targets_BT[..., None])[..., 0]
        task = -((1 - smoothing) * picked + smoothing * logp.mean(-1)).mean()
        assert torch.allclose(outcome.metrics["task"], task, atol=1e-5) and {"task", "balance", "z"} == set(outcome.metrics)
        assert torch.allclose(outcome.loss, sum(outcome.metrics.values()))


def test_routers_are_told_the_domains(make_config, make_loop, monkeypatch):
    loop, seen = make_loop(make_config()), []
    router = loop.module.layers[0].block.router
    decide = router.decide
    monkeypatch.setattr(router, "decide", lambda x, ctx: seen.append(ctx) or decide(x, ctx))
    loop.train_step()
    (ctx,) = seen
    assert ctx.training and ctx.step == 0
    assert torch.equal(ctx.carry["domain_T"].view(4, 16)[:, 0], loop.stream.batch(0, 4).domain_B)


def test_masked_documents_are_read_as_if_each_were_alone(make_config, make_loop):
    batch = make_loop(make_config(data={"mask_documents": True})).stream.gather([(0, 3), (1, 5)])
    document_BT = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] + [2] * 6])
    batch = dataclasses.replace(batch, document_BT=document_BT)
    module = build(make_config().model).eval()
    together = run(module, batch, 0).logits_BTV
    for row, documents, found in zip(batch.tokens_BT, document_BT, together, strict=True):
        alone = [module(row[documents == d][None]).logits_BTV[0] for d in documents.unique()]
        torch.testing.assert_close(found, torch.cat(alone))
    assert not torch.allclose(run(module, dataclasses.replace(batch, document_BT=None), 0).logits_BTV, together, atol=1e-4)


def test_controllers_get_every_micro_batch_after_the_step(make_config, make_loop):
    config = make_config(model={"router": {"name": "topk", "balance": 0.0}, "taps": [{"name": "loss_free", "rate": 0.5}]})
    config = make_config(**{**config.to_json(), "batch": 8, "micro_batch": 2})
    loop = make_loop(config)
    (first, _) = loop.module.controllers()
    assert not first.bias_E.any()
    entry = loop.train_step()
    assert set(first.bias_E.abs().unique().tolist()) <= {0.0, 0.5} and first.bias_E.any() and entry["maxvio"] > 0


def test_drops_and_balance_are_counted(make_config, make_loop):
    """Capacity 1 pair per expert: E pairs of T survive, whatever the router does."""
    taps = [{"name": "capacity", "train": 4 / (4 * 16 * 2), "evaluate": 0}]
    loop = make_loop(make_config(model={"taps": taps}))
    entry = loop.train_step()
    pairs = 4 * 16 * 2
    left = round(entry["active"] * 4 * 16)
    assert left <= 4 and entry["dropped"] == pytest.approx(1 - left / pairs)
    assert entry["unrouted"] >= 1 - 4 / 64 and entry["maxvio_worst"] >= entry["maxvio"] >= 0


def test_maxvio_by_hand(make_config, make_loop):
    """A router whose gate is zero gives every token to the same experts: max c / mean c - 1 = E / K - 1."""
    loop = make_loop(make_config(model={"top_k": 1}))
    with torch.no_grad():
        for layer in loop.module.layers:
            layer.block.router.score.gate.weight.zero_()
    entry = loop.train_step()
    assert entry["maxvio"] == entry["maxvio_worst"] == 3.0 and entry["active"] == 1.0


def test_pure_micro_batches_are_of_one_domain(make_config, make_loop):
    seen = []

    def objective(module, batch, step, rng):
        seen.append(set(batch.domain_B.tolist()))
        return Outcome(run(module, batch, step, rng).logits_BTV.mean())

    loop = make_loop(make_config(batch=16, micro_batch=4, data={"pure": True}), objective=objective)
    for _ in range(3):
        loop.train_step()
    assert len(seen) == 12 and all(len(domains) == 1 for domains in seen) and len(set.union(*seen)) > 1


def test_bfloat16_autocast(make_config, make_loop, tmp_path):
    full = make_loop(make_config(steps=3), tmp_path / "a")
    half = make_loop(make_config(steps=3, precision="bfloat16"), tmp_path / "b")
    full.run(), half.run()
    assert losses(tmp_path / "a") != losses(tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.parameters)


def test_a_loss_that_is_not_finite_stops_before_the_weights(make_config, make_loop):
    loop = make_loop(make_config(save_every=1))
    with torch.no_grad():
        loop.module.head.weight.fill_(float("inf"))
    before = [p.detach().clone() for p in loop.parameters]
    with pytest.raises(MoestroError, match=r"step 1: loss [\s\S]*expected: finite[\s\S]*rate"):
        loop.train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, loop.parameters, strict=True))


class Twice(nn.Module):
    """Two forward passes with their own dice, and a learnt temperature: what an objective may be."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, module, batch, step, rng) -> Outcome:
        self.calls += 1
        outputs = [run(module, batch, step, rng) for _ in range(2)]
        task = sum(cross_entropy(o.logits_BTV * self.log_scale.exp(), batch) for o in outputs) / 2
        p, q = (functional.log_softmax(o.logits_BTV, -1) for o in outputs)
        apart = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
        return Outcome(task + apart, {"apart": apart}, outputs)


def test_an_objective_of_two_passes_is_trained_and_saved(make_config, make_loop, tmp_path):
    config = make_config(model={"router": "noisy_topk"}, steps=4, save_every=2)
    whole = make_loop(config, tmp_path / "a", objective=Twice())
    whole.run()
    assert int(whole.objective.calls) == 4 and whole.objective.log_scale.item() != 0
    entries = read(tmp_path / "a")
    assert all(e["apart"] > 0 for e in entries if "loss" in e)  # the noise differs between the passes
    part = make_loop(make_config(model={"router": "noisy_topk"}, steps=4, save_every=2), tmp_path / "b", objective=Twice())
    assert part.run(lambda: part.step == 2)["stopped"]
    again = make_loop(config, tmp_path / "b", objective=Twice())
    assert again.resume() and again.step == 2 and int(again.objective.calls) == 2
    again.run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and int(again.objective.calls) == 4


class CloneFirst:
    """Until `at` only expert 0 learns; then all get its weights: a phase that changes the model between steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, module, optimiser, step, steps):
        if step == self.at:
            with torch.no_grad():
                for layer in module.layers:
                    layer.block.experts.gate_up_EFD.copy_(layer.block.experts.gate_up_EFD[:1].expand(4, -1, -1))
        return {"stage": float(step >= self.at)}


def test_phases_act_once_and_are_logged(make_config, make_loop, tmp_path):
    assert isinstance(CloneFirst(2), Phase)
    whole = make_loop(make_config(steps=4), tmp_path / "a", phases=[CloneFirst(2)])
    whole.run()
    assert [e["stage"] for e in read(tmp_path / "a") if "loss" in e] == [0, 0, 1, 1]
    for stop in (2, 3):  # a checkpoint just before the phase and just after it
        part = make_loop(make_config(steps=4), tmp_path / f"b{stop}", phases=[CloneFirst(2)])
        part.run(lambda part=part, stop=stop: part.step == stop)
        again = make_loop(make_config(steps=4), tmp_path / f"b{stop}", phases=[CloneFirst(2)])
        assert again.resume()
        again.run()
        assert losses(tmp_path / "a") == losses(tmp_path / f"b{stop}")


def test_frozen_parameters_stay(make_config, make_loop):
    loop = make_loop(make_config(steps=3))
    gate = loop.module.layers[0].block.router.score.gate.weight.requires_grad_(False)
    before = gate.clone()
    loop.run()
    assert torch.equal(gate, before)


def test_the_callers_randomness_and_settings_are_left_alone(make_config, make_loop):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make_loop(make_config(model={"router": "noisy_topk"}, steps=2)).run()
    assert torch.equal(torch.rand(2), expected) and not torch.are_deterministic_algorithms_enabled()
