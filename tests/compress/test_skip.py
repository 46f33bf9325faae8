"""Skipping experts at run time: the rules, what plans say of them, and that both runners obey what a folder carries."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.planner import Wish, plan_compression
from moestro.compress.record import read_plan_of
from moestro.core.errors import InputError, PlanError
from moestro.core.method import load
from moestro.core.plan import read_plan
from moestro.core.plans.compression import CompressionPlan, LayerChange, Slot, TapUse
from moestro.core.routing import EMPTY, RouteContext, Routing, Tap
from moestro.engine.engine import Engine
from moestro.engine.sample import SamplingParams
from moestro.evaluate.comparison import compare
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.models.writer import Edits, Made, edit_checkpoint
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from tests.compress.conftest import subject

RNG = np.random.default_rng(0)
SEQUENCES = RNG.integers(4, 128, (4, 24)).tolist()


def routing(tokens: int = 40, slots: int = 4, seed: int = 0) -> Routing:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(8)[:slots] for _ in range(tokens)])
    weights = rng.random((tokens, slots)).astype(np.float32)
    ids[3, 1:] = EMPTY
    weights[3, 1:] = 0
    return Routing(ids, weights)


def in_torch(r: Routing) -> Routing:
    return Routing(torch.from_numpy(r.experts_TK), torch.from_numpy(r.weights_TK))


def tap(name: str, **settings):
    return load(name, "tap")(None, **settings)


def left(r: Routing) -> np.ndarray:
    return np.asarray(r.experts_TK) >= 0


@pytest.mark.parametrize(
    "made",
    [
        tap("weight_ratio", threshold=0.5, protect=0.1, renormalise=True),
        tap("weight_ratio", threshold=0.7),
        tap("first", number=2),
    ],
    ids=["protected", "ratio", "first"],
)
def test_numpy_and_torch_agree_and_something_goes(made):
    r = routing()
    x_TD = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)
    a = made(r, RouteContext(x_TD=x_TD))
    b = made(in_torch(r), RouteContext(x_TD=torch.from_numpy(x_TD)))
    assert np.array_equal(a.experts_TK, b.experts_TK.numpy())
    np.testing.assert_allclose(a.weights_TK, b.weights_TK.numpy(), rtol=1e-6)
    assert left(a).any(1).all() and 0 < left(a).sum() < left(r).sum()
    assert (a.weights_TK[~left(a)] == 0).all()


def test_the_ratio_rule():
    r, ctx = routing(), RouteContext()
    assert np.array_equal(tap("weight_ratio", threshold=0.0)(r, ctx).experts_TK, r.experts_TK)
    most = tap("weight_ratio", threshold=1.0)(r, ctx)
    assert (left(most).sum(1) == 1).all() and np.array_equal(left(most).argmax(1), r.weights_TK.argmax(1))
    kept = [left(tap("weight_ratio", threshold=t)(r, ctx)) for t in (0.1, 0.4, 0.8)]
    assert all((b <= a).all() for a, b in itertools.pairwise(kept)), "a higher threshold keeps a part of what a lower one keeps"
    same = tap("weight_ratio", threshold=0.5, renormalise=True)(r, ctx)
    np.testing.assert_allclose(same.weights_TK.sum(1), r.weights_TK.sum(1), rtol=1e-5)
    x_TD = np.ones((40, 6), np.float32)
    x_TD[7] = -9
    safe = left(tap("weight_ratio", threshold=1.0, protect=0.02)(r, RouteContext(x_TD=x_TD)))
    assert safe[7].all() and (np.delete(safe, 7, 0).sum(1) == 1).all(), "the loudest token keeps all its experts"
    alone = Routing(r.experts_TK[7:8], r.weights_TK[7:8])
    assert left(tap("weight_ratio", threshold=1.0, protect=0.02)(alone, RouteContext(x_TD=x_TD[7:8]))).sum() == 1, "decoding"


def test_the_first_of_each_token():
    r = routing()
    for k in (1, 2, 4):
        some = left(tap("first", number=k)(r, RouteContext()))
        heaviest = np.argsort(-np.where(left(r), r.weights_TK, -1), axis=1, kind="stable")[:, :k]
        wanted = np.zeros_like(some)
        np.put_along_axis(wanted, heaviest, True, 1)
        assert np.array_equal(some, wanted & left(r))
    with pytest.raises(InputError):
        tap("first", number=0)


def profiled(model):
    texts = cut([Document("all", str(i), tokens=s) for i, s in enumerate(SEQUENCES)], None, length=48)
    recording = Recording(model, texts, make({name: {} for name in ("counts", "gates", "ratios")}))
    recording.run(model)
    return recording.profile()


@pytest.fixture(scope="module")
def sharp(saved_model, tmp_path_factory):
    """A model whose layers differ: the first layer's routers are sure of one expert, the second's hardly prefer any."""
    checkpoint = Checkpoint.open(saved_model)
    edits = {}
    for i, factor in enumerate((6.0, 0.5)):
        name = f"model.layers.{i}.mlp.gate.weight"
        array = np.float32(factor) * checkpoint.read(name)
        edits[name] = Made("F32", array.shape, lambda array=array: array)
    made = edit_checkpoint(checkpoint, tmp_path_factory.mktemp("sharp") / "model", Edits(replace=edits))
    model = open_model(made)
    return made, model, profiled(model)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    from moestro.testing.tiny import save_tiny

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    save_tiny("olmoe", folder, None, "float32", num_experts=8, num_experts_per_tok=4, num_hidden_layers=2)
    return folder


def plan_of(method, one, **wish) -> CompressionPlan:
    checkpoint, _, profile = one
    return plan_compression(method, checkpoint, describe(checkpoint), Wish(**wish), profile=profile)


def kl(model, one) -> float:
    changed = compress_live(model, one[1]) if isinstance(model, CompressionPlan) else model
    every = [[(e,) for e in range(8)]] * 2
    found = compare(changed, one[1], SEQUENCES, every)
    return float(found.quality.kl or 0)


def skipped(plan: CompressionPlan, one) -> float:
    return compare(compress_live(plan, one[1]), one[1], SEQUENCES, [[(e,) for e in range(8)]] * 2).skipped


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_odp_skips_what_was_asked_for_and_beats_chance(sharp, share):
    plan = plan_of("odp", sharp, options={"share": share, "protect": 0.0})
    found = skipped(plan, sharp)
    assert found == pytest.approx(share * 3 / 4, abs=0.02)
    assert sum(la.loss or 0 for la in plan.layers) / 2 == pytest.approx(found, abs=0.02), "the plan said so"

    def lots(r: Routing, ctx: RouteContext) -> Routing:
        """As many pairs but the heaviest of each token, drawn."""
        others = r.weights_TK < r.weights_TK.amax(1, keepdim=True)
        gone = others & (torch.rand(r.weights_TK.shape, generator=generator) < share)
        return r.drop(gone, renormalise=False)

    generator, drawn = torch.Generator().manual_seed(0), open_model(sharp[0])
    for layer in drawn.layers:
        layer.replace(router=layer.router.tapped(Tap("routing", lots)))
    assert kl(plan, sharp) < 0.8 * kl(drawn, sharp)


def test_odp_at_its_ends(sharp):
    none = plan_of("odp", sharp, options={"share": 0.0})
    assert skipped(none, sharp) == 0 and kl(none, sharp) < 1e-9
    every = plan_of("odp", sharp, options={"share": 1.0, "protect": 0.0})
    first = plan_of("fewer", sharp, options={"average": 1.0})
    a, b = (next(iter(compress_live(p, sharp[1]).run(SEQUENCES[:1]))).logits_TV for p in (every, first))
    torch.testing.assert_close(a, b)


def test_fewer_takes_from_the_layer_that_is_sure(sharp):
    plan = plan_of("fewer", sharp, options={"average": 2.5})
    numbers = [la.taps[0].settings["number"] for la in plan.layers]
    assert sum(numbers) == 5 and numbers == [1, 4]
    turned = replace(plan, layers=tuple(replace(la, taps=o.taps) for la, o in zip(plan.layers, plan.layers[::-1], strict=True)))
    assert kl(plan, sharp) < 0.8 * kl(turned, sharp)
    assert kl(plan_of("fewer", sharp, options={"average": 4.0}), sharp) < 1e-9
    with pytest.raises(InputError, match="experts per token"):
        plan_of("fewer", sharp, options={"average": 0.5})


def test_both_runners_obey_the_folder(sharp, tmp_path):
    checkpoint, model, _ = sharp
    plan = plan_of("odp", sharp, options={"protect": 0.0})
    plan.save(tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan and "skips experts" in plan.summary()
    made = compress(plan, checkpoint, describe(checkpoint), tmp_path / "out")
    assert read_plan_of(tmp_path / "out").layers == plan.layers
    opened = open_model(made.checkpoint)
    want = [out.logits_TV for out in compress_live(plan, model).run(SEQUENCES)]
    for a, b in zip(opened.run(SEQUENCES), want, strict=True):
        torch.testing.assert_close(a.logits_TV, b)
    for trunk in ("native", "transformers"):
        with Engine.open(tmp_path / "out", trunk=trunk, threads=1) as engine:
            for got, b in zip(engine.run(SEQUENCES), want, strict=True):
                np.testing.assert_allclose(got.logits_TV, b.numpy(), atol=2e-5)
                assert (got.records[0].routing.experts_TK < 0).any()
            generation = engine.generate([SEQUENCES[0]], SamplingParams(max_tokens=8, ignore_eos=True), text=False)
            answer = generation.run()[0].tokens
            told = generation.statistics
            assert told is not None and not told.exact and 0.2 < told.skipped / told.routed < 0.6
            assert "layers.taps.weight_ratio" in told.summary() and "were skipped" in told.summary()
        ids = SEQUENCES[0] + answer
        greedy = next(iter(opened.run([ids]))).logits_TV[len(SEQUENCES[0]) - 1 : -1].argmax(-1).tolist()
        assert answer == greedy, "decoding token by token skips as reading at once does"


def test_taps_are_not_lost_unseen(sharp, tmp_path):
    checkpoint, _, profile = sharp
    plan = plan_of("odp", sharp)
    made = compress(plan, checkpoint, describe(checkpoint), tmp_path / "out").checkpoint
    with pytest.raises(PlanError, match="skips experts"):
        new = plan_compression("ratio", made, describe(made), Wish())
        compress(new, made, describe(made), tmp_path / "again")
    with pytest.raises(PlanError, match="at run time"):
        plan_compression("frequency", checkpoint, describe(checkpoint), Wish(keep=6), profile=profile, base=plan)
    both = plan_compression("ratio", checkpoint, describe(checkpoint), Wish(), base=plan_of("frequency", sharp, keep=6))
    assert both.experts == 6 and both.layers[0].taps[0].tap == "layers.taps.weight_ratio"
    assert "decided by the original" not in both.summary(), "a constant is no statistic"
    with pytest.raises(InputError, match="removes no experts"):
        plan_of("odp", sharp, keep=4)


def test_a_folder_with_unknown_taps_says_so(saved, tmp_path):
    one = saved("mixtral")
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in range(la.num_experts)), taps=(TapUse("nothing"),)) for la in one.layout.facts.layers)  # fmt: skip
    plan = CompressionPlan(subjects=subject(one), method="by.hand", layers=layers)
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    with pytest.raises(InputError, match="'nothing'"):
        open_model(made.checkpoint)
    record = json.loads((tmp_path / "out" / "moestro.json").read_text())
    assert record["plan"]["layers"][0]["taps"] == [{"tap": "nothing", "settings": {}}]
