"""What is trained of a pretrained model: only what it says, towards what it says, and the checkpoint afterwards is a model of the same family."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moestro.compress.executor import compress
from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.plan import Subject
from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot
from moestro.core.routing import RouteContext, Routing, Tap
from moestro.layers.taps.compressed_experts import CompressedExperts
from moestro.layers.taps.learned_mask import LearnedMask
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.models.writer import Edits, Made, edit_checkpoint
from moestro.testing.tiny import save_tiny
from moestro.train import tuned
from moestro.train.config import changed
from moestro.train.parallel import Group
from moestro.train.pretrained import Pretrained

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "into", "some", "deep", "green", "wood")
TEXT = " ".join(random.Random(0).choices(WORDS, k=1200))


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tuning") / "model"
    save_tiny("olmoe", folder, None, "float32", num_hidden_layers=2, num_experts=8, num_experts_per_tok=2)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text(TEXT)
    return file


def prune(source: Path, out: Path, kept: list[int]) -> Path:
    checkpoint = Checkpoint.open(source)
    layout = describe(checkpoint)
    layers = tuple(LayerChange(i, tuple(Slot((e,)) for e in kept)) for i in range(2))
    plan = CompressionPlan(subjects=(Subject("m", layout.facts.fingerprint),), method="by.hand", layers=layers)
    compress(plan, checkpoint, layout, out)
    return out


class Run:
    """A tuning that was carried out: the pretrained student, the loop, its summary, and what was left in `out`."""

    def __init__(self, name: str, model: Path, text: Path, where: Path, *, against: Path | None = None, steps: int = 12,
                 rate: float = 0.01, **options: Any) -> None:  # fmt: skip
        settings = {"data": {"tokenizer": str(model), "length": 24, "sources": [str(text)]}, "steps": steps, "batch": 4,
                    "optimiser": {"rate": rate, "decay": 0.0}, "model": {"context": 64}, "evaluate_sequences": 8}  # fmt: skip
        self.student = Pretrained(open_model(model, "float32"))
        teacher = None if against is None else Pretrained(open_model(against, "float32"))
        self.tuning = tuned.make(name, self.student, teacher, options)
        self.loop = tuned.loop_of(changed(settings), self.student, self.tuning, where / "run", Group())
        self.out = where / "out"

    def go(self) -> dict[str, Any]:
        self.summary = self.loop.run()
        self.left = tuned.finish(self.loop, self.student, self.tuning, self.out)
        return self.summary


def far(model: Any, original: Path) -> float:
    """Mean KL to the original on text that was not trained on."""
    from moestro.models.tokenizer import Tokenizer

    told = Tokenizer.open(original).encode(" ".join(random.Random(1).choices(WORDS, k=80)), add_special=False)
    ids = [list(told[i : i + 24]) for i in range(0, 144, 24)]
    other = open_model(original, "float32")
    pairs = zip(model.run(ids), other.run(ids), strict=True)
    return float(np.mean([float(tuned.distance(a.logits_TV[None], b.logits_TV[None])) for a, b in pairs]))


def differing(a: Path, b: Path) -> set[str]:
    one, other = Checkpoint.open(a), Checkpoint.open(b)
    assert set(one.tensors) == set(other.tensors)
    return {name for name in one.tensors if not np.array_equal(one.read(name), other.read(name))}


def test_router_and_norms_recover_and_touch_nothing_else(original, text, tmp_path):
    small = prune(original, tmp_path / "small", [0, 2, 3, 5, 7])
    run = Run("router_norms", small, text, tmp_path, against=original, steps=25, mix=1.0)
    before = far(run.student.model, original)
    run.go()
    assert differing(small, run.out) <= {n for n in Checkpoint.open(small).tensors if "norm" in n or ".mlp.gate." in n}
    assert differing(small, run.out), "something was learned"
    saved = open_model(run.out, "float32")
    assert far(saved, original) == pytest.approx(far(run.student.model, original), rel=1e-4), "the file is what was trained"
    assert far(saved, original) < 0.9 * before


def test_low_rank_is_nothing_at_first_and_more_than_norms_at_last(original, text, tmp_path):
    small = prune(original, tmp_path / "small", [0, 2, 3, 5, 7])
    run = Run("low_rank", small, text, tmp_path, against=original, steps=25, mix=1.0, rank=2, alpha=4.0, experts=True)
    ids = [[5, 6, 7, 8, 9]]
    fresh, there = (next(iter(m.run(ids))).logits_TV for m in (run.student.model, open_model(small, "float32")))
    torch.testing.assert_close(fresh, there)
    run.go()
    plain = Run("router_norms", small, text, tmp_path / "other", against=original, steps=25, mix=1.0)
    plain.go()
    assert far(open_model(run.out, "float32"), original) < far(open_model(plain.out, "float32"), original)
    a, b = (read_expert(c, describe(c), ExpertKey(0, 1)) for c in map(Checkpoint.open, (small, run.out)))
    for name in ("gate_FD", "up_FD", "down_DF"):
        change = getattr(b, name) - getattr(a, name)
        assert change.any() and np.linalg.matrix_rank(change, tol=1e-5) <= (2 if name == "down_DF" else 4)
    norm_only = {n for n in differing(small, run.out) if "norm" not in n}
    assert any("self_attn" in n for n in norm_only) and not any("embed" in n or "lm_head" in n for n in norm_only)


def test_expert_wise_keeps_zeros_and_brings_experts_nearer(original, text, tmp_path):
    checkpoint, rng, edits = Checkpoint.open(original), np.random.default_rng(0), {}
    for name in checkpoint.tensors:
        if ".experts." in name:
            array = checkpoint.read(name) * (rng.random(checkpoint.tensors[name].shape) < 0.5)
            edits[name] = Made("F32", array.shape, lambda array=array: array.astype(np.float32))
    sparse = edit_checkpoint(checkpoint, tmp_path / "sparse", Edits(replace=edits)).path
    run = Run("expert_wise", sparse, text, tmp_path, against=original, steps=40, rate=0.01)
    before = far(run.student.model, original)
    first = run.loop.train_step()["experts"]
    summary = run.go()
    assert summary["last"]["experts"] < 0.8 * first
    for name in edits:
        old, new = Checkpoint.open(sparse).read(name), Checkpoint.open(run.out).read(name)
        assert (new[old == 0] == 0).all() and (new != old).any(), name
    assert before > 0
    same = Run("expert_wise", original, text, tmp_path / "same", against=original, steps=1)
    assert same.loop.train_step()["experts"] == 0
    with pytest.raises(InputError, match="experts in a layer"):
        Run("expert_wise", prune(original, tmp_path / "few", [0, 1, 2]), text, tmp_path / "x", against=original)


def test_a_teacher_is_asked_for(original, text, tmp_path):
    with pytest.raises(InputError, match="learns from the original"):
        Run("router_norms", original, text, tmp_path)
    with pytest.raises(InputError, match="no option"):
        Run("otp", original, text, tmp_path, cost=1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Four of eight experts for each token."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    save_tiny("olmoe", folder, None, "float32", num_hidden_layers=2, num_experts=8, num_experts_per_tok=4)
    return folder


def test_otp_learns_masks_alone_and_a_price_makes_them_smaller(wide, text, tmp_path):
    kept = {}
    for price in (0.0, 0.05):
        run = Run("otp", wide, text, tmp_path / str(price), steps=25, rate=0.02, price=price)
        assert all(not p.requires_grad for p in run.student.parameters())
        kept[price] = run.go()["last"]["kept"]
        assert not differing(wide, run.out)
    assert kept[0.05] < kept[0.0] - 0.2
    use = run.left.taps[0][0]
    arrays = {name.removeprefix("layer-0."): a for name, a in run.left.arrays.items() if name.startswith("layer-0.")}
    tap = LearnedMask(arrays, use.settings["renormalise"])
    rng = np.random.default_rng(0)
    width = arrays["w1"].shape[0] - 4
    routing = Routing(np.stack([rng.permutation(8)[:4] for _ in range(50)]), rng.random((50, 4)).astype(np.float32))
    x_TD = rng.standard_normal((50, width)).astype(np.float32)
    a = tap(routing, RouteContext(x_TD=x_TD))
    tensors = Routing(torch.from_numpy(routing.experts_TK), torch.from_numpy(routing.weights_TK))
    b = tap(tensors, RouteContext(x_TD=torch.from_numpy(x_TD)))
    assert np.array_equal(a.experts_TK, b.experts_TK.numpy()) and (a.experts_TK >= 0).any(1).all()
    network = run.tuning.objective.networks[0]  # type: ignore[attr-defined]
    assert np.array_equal(network.mask(tensors, torch.from_numpy(x_TD), 1.0, None).detach().numpy() > 0.5, a.experts_TK >= 0)
    heaviest = np.argsort(-routing.weights_TK, 1)
    there = np.take_along_axis(a.experts_TK >= 0, heaviest, 1)
    assert (there[:, :-1] >= there[:, 1:]).all(), "nested: no expert runs without all heavier ones"


def test_compressed_experts_of_ones_are_the_main_experts_alone(wide):
    model, plain = open_model(wide, "float32"), open_model(wide, "float32")
    for layer, other in zip(model.layers, plain.layers, strict=True):
        spec = layer.facts.spec
        ones = {
            "gate_ED": np.ones((8, spec.d_model)),
            "hidden_EF": np.ones((8, spec.d_expert)),
            "up_ED": np.ones((8, spec.d_model)),
        }
        layer.scaling = CompressedExperts({n: a.astype(np.float32) for n, a in ones.items()}, 2)

        def heaviest(routing: Routing, ctx: RouteContext) -> Routing:
            rank_TK = routing.weights_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            return routing.drop(rank_TK >= 2, renormalise=False)

        other.replace(router=other.router.tapped(Tap("routing", heaviest)))
    ids = [[5, 6, 7, 8, 9, 10, 11]]
    a, b = (next(iter(m.run(ids))) for m in (model, plain))
    torch.testing.assert_close(a.logits_TV, b.logits_TV)
    assert all(((r.routing.experts_TK >= 0).sum(1) == 2).all() for r in a.records), "T * main experts run"


def test_compressed_experts_train_what_was_auxiliary_and_beat_the_main_ones(wide, text, tmp_path):
    run = Run("compressed_experts", wide, text, tmp_path, steps=30, rate=0.01, vectors_only=True)
    run.loop.train_step()
    vectors = run.tuning.objective.layers[0]["gate_ED"]  # type: ignore[attr-defined]
    assert vectors.grad is not None and vectors.grad.any() and all(p.grad is None for p in run.student.parameters())
    order = torch.tensor([[3, 1, 0, 2]])
    tap = CompressedExperts({n: p.detach() for n, p in run.tuning.objective.layers[0].items()}, 2)  # type: ignore[attr-defined]
    ids, weights = torch.tensor([[1, 4, 6, 7]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    _, a = tap.split(Routing(ids, weights))
    _, b = tap.split(Routing(ids.gather(1, order), weights.gather(1, order)))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)
    start = run.loop.evaluate()["loss"]
    assert run.go()["evaluation"]["loss"] < start - 0.05
    assert not differing(wide, run.out) and len(run.left.arrays) == 6


def test_experts_that_a_task_does_not_use_leave(original, text, tmp_path):
    run = Run("tsep", original, text, tmp_path, steps=12, rate=0.003, keep=3, threshold=0.5)
    seen = []
    for _ in range(12):
        run.loop.train_step()
        scores = run.tuning.objective
        alive = scores.alive_LE.clone()  # type: ignore[attr-defined]
        for layer, (_, routing) in run.student.watched.items():
            assert alive[layer][routing.experts_TK].all(), "no dropped expert is chosen"
        seen.append(alive)
    assert all((b <= a).all() for a, b in itertools.pairwise(seen)), "nested"
    assert seen[5].sum() < 16 and (seen[6].sum(1) == 3).all() and (seen[-1].sum(1) == 3).all()
    left = tuned.finish(run.loop, run.student, run.tuning, run.out)
    assert left.kept is not None
    small = prune_each(run.out, tmp_path / "small", left.kept)
    ids = [[5, 6, 7, 8, 9, 10]]
    a, b = (next(iter(m.run(ids))).logits_TV for m in (run.student.model, open_model(small, "float32")))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="are to stay"):
        Run("tsep", original, text, tmp_path / "y", keep=1)


def prune_each(source: Path, out: Path, kept: tuple[tuple[int, ...], ...]) -> Path:
    checkpoint = Checkpoint.open(source)
    layout = describe(checkpoint)
    layers = tuple(LayerChange(i, tuple(Slot((e,)) for e in ids)) for i, ids in enumerate(kept))
    plan = CompressionPlan(subjects=(Subject("m", layout.facts.fingerprint),), method="by.hand", layers=layers)
    compress(plan, checkpoint, layout, out)
    return out


def test_a_run_that_was_stopped_goes_on(original, text, tmp_path):
    whole = Run("otp", original, text, tmp_path / "whole", steps=6)
    whole.go()
    part = Run("otp", original, text, tmp_path / "part", steps=6)
    stops = iter([False, False, True])
    assert part.loop.run(lambda: next(stops))["stopped"]
    again = Run("otp", original, text, tmp_path / "part", steps=6)
    assert again.loop.step == 3
    again.go()
    assert all(np.array_equal(whole.left.arrays[name], a) for name, a in again.left.arrays.items())


def test_learned_masks_beat_chance_at_the_same_number_of_experts(wide, text, tmp_path):
    run = Run("otp", wide, text, tmp_path, steps=40, rate=0.02, price=0.01)
    run.go()
    run.student.eval()
    learned = far(run.student.model, wide)
    kept = float(torch.stack(run.tuning.objective.kept).detach().mean())  # type: ignore[attr-defined]
    assert 1 < kept < 3.9
    generator, drawn = torch.Generator().manual_seed(0), open_model(wide, "float32")

    def lots(routing: Routing, ctx: RouteContext) -> Routing:
        """As many experts in the mean: the heaviest, and drawn ones."""
        number = torch.full((routing.tokens,), kept) + torch.rand(routing.tokens, generator=generator) - 0.5
        order = torch.rand(routing.weights_TK.shape, generator=generator)
        order[routing.weights_TK == routing.weights_TK.amax(1, keepdim=True)] = -1
        place = order.argsort(dim=1).argsort(dim=1)
        return routing.drop(place >= number.round().clamp_min(1)[:, None], renormalise=False)

    for layer in drawn.layers:
        layer.replace(router=layer.router.tapped(Tap("routing", lots)))
    assert learned < 0.8 * far(drawn, wide)


def test_vectors_beat_the_main_experts_alone_after_equal_training(wide, text, tmp_path):
    found = {}
    for name in ("vectors", "main alone"):
        run = Run("compressed_experts", wide, text, tmp_path / name, steps=25, rate=0.003)
        if name == "main alone":
            for p in run.tuning.objective.parameters():  # type: ignore[attr-defined]
                p.requires_grad_(False)
        found[name] = run.loop.run()["evaluation"]["loss"]
    assert found["vectors"] < found["main alone"]


def test_a_planted_domain_keeps_its_experts(tmp_path):
    """Fine-tuned on one domain's tokens, task-specific pruning keeps that domain's experts and no others."""
    from moestro.testing.planted import domain_model
    from moestro.train.data.stream import Stream
    from moestro.train.data.tokens import Domain, Tokens
    from moestro.train.loop import Loop

    made = domain_model(tmp_path / "model", experts_per_domain=3, idle=3, tokens_per_domain=6, d_expert=8, length=24)
    own = [s for s in made.sequences if made.truth.group_V[s[0]] == 1]
    ids = np.array([t for s in own for t in s] * 4, np.uint16)
    tokens = Tokens(tmp_path, (Domain("one", len(ids), len(ids), 1, ""),), (ids,), 18, 0)
    config = changed({"data": {"length": 23}, "steps": 8, "batch": 2, "optimiser": {"rate": 1e-4}, "model": {"context": 64}})
    student = Pretrained(open_model(made.path, "float32"))
    tuning = tuned.make("tsep", student, None, {"keep": 3, "windows": 2})
    stream = Stream(tokens, length=23, holdout=0.0, weights={}, seed=0)
    (tmp_path / "run").mkdir()
    Loop(config, student, stream, tmp_path / "run", objective=tuning.objective, phases=tuning.phases).run()
    left = tuning.finish()
    assert left.kept is not None
    for ordinal, ids_kept in enumerate(left.kept):
        assert set(ids_kept) == made.truth.domain_experts(1, ordinal)
