"""Mixed precision: budgets kept, brute force, planted importance."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moestro.compress.bits import BitsWish, plan_bits
from moestro.compress.budget.block_importance import block_importance
from moestro.compress.budget.frequency import frequency
from moestro.compress.budget.mc_moe import mc_moe
from moestro.compress.budget.mc_sharp import mc_sharp
from moestro.compress.budget.program import solve
from moestro.compress.budget.quantmoe_bench import quantmoe_bench
from moestro.compress.calibration import Calibration, LayerInputs
from moestro.compress.evidence import BitsEvidence, EvidenceFile, measure, outliers, output
from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey, ExpertSpec, ExpertWeights
from moestro.core.method import load
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import describe
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny
from tests.laws.cards import cards

METHODS = [load(card.name, "bits") for card in cards("moestro.compress.budget", "bits")]


@pytest.fixture
def evidence():
    rng = np.random.default_rng(0)
    there = np.ones((3, 6), bool)
    there[2, 4:] = False
    error = np.sort(rng.uniform(0.1, 4, (3, 6, 3)), axis=2)[..., ::-1]
    shape = there.shape
    counts = rng.integers(1, 100, shape) * there
    return BitsEvidence(
        there, counts, counts * rng.uniform(0.2, 1, shape), error, error * 2, rng.uniform(1, 9, shape), np.tile([100, 160, 220], (3, 1)),
        turned_L=np.array([0.1, 0.9, 0.2]),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
class TestEveryMethod:
    def test_keeps_the_budget_and_names_widths_that_exist(self, method, evidence):
        for budget in (2100, 2500, 16 * 220):
            widths_LE = method(evidence, budget)
            assert widths_LE.shape == evidence.there_LE.shape and ((widths_LE >= 0) & (widths_LE <= 2)).all()
            assert evidence.spent(widths_LE) <= budget
        assert (widths_LE[evidence.there_LE] == 2).all(), "where there is room for all, all have the most"

    def test_refuses_what_cannot_be(self, method, evidence):
        with pytest.raises(InputError, match="at least 1600"):
            method(evidence, 1599)

    def test_says_the_same_twice(self, method, evidence):
        assert np.array_equal(method(evidence, 2300), method(evidence, 2300))


def test_the_program_is_as_good_as_all_choices():
    rng = np.random.default_rng(1)
    for _ in range(10):
        loss_NW = np.sort(rng.uniform(0, 1, (5, 3)), axis=1)[:, ::-1]
        bytes_NW = np.tile([10, 16, 22], (5, 1))
        budget = int(rng.integers(70, 100))
        choices = np.array(list(itertools.product(range(3), repeat=5)))
        rows = np.arange(5)
        fits = [c for c in choices if bytes_NW[rows, c].sum() <= budget and 2 in c and 1 in c]
        best = min(loss_NW[rows, c].sum() for c in fits)
        found = solve(loss_NW, bytes_NW, budget, present=(2, 1))
        assert loss_NW[rows, found].sum() == pytest.approx(best, rel=1e-5) and {1, 2} <= set(found)
    with pytest.raises(InputError, match="must occur"):
        solve(loss_NW, bytes_NW, 52, present=(2, 1))


def test_importance_never_costs_bits(evidence):
    """Experts with the same errors: the one that is used more and weighs more has at least as many bits."""
    same = replace(evidence, output_LEW=np.broadcast_to(np.array([4.0, 1.0, 0.2]), (3, 6, 3)), there_LE=np.ones((3, 6), bool))
    same.counts_LE[...] = same.weights_LE[...] = np.arange(1, 7)
    for scope in ("layer", "model"):
        widths_LE = mc_moe(same, 18 * 160, scope=scope)
        assert (np.diff(widths_LE, axis=1) >= 0).all() and len(np.unique(widths_LE)) > 1


def test_the_widest_two_occur_in_each_layer_unless_told_otherwise(evidence):
    widths_LE = mc_moe(evidence, 2400, present=True)
    assert all({1, 2} <= set(row[there]) for row, there in zip(widths_LE, evidence.there_LE, strict=True))
    flat = replace(evidence, output_LEW=np.ones((3, 6, 3)))
    assert evidence.spent(mc_moe(flat, 1600)) == 1600
    with pytest.raises(InputError, match="scope"):
        mc_moe(evidence, 2200, scope="expert")


def test_a_program_for_the_model_is_no_worse_than_one_for_each_layer(evidence):
    def loss(widths_LE):
        share = evidence.output_LEW / evidence.output_LEW[..., 0].sum(1)[:, None, None]
        phi, w = (x / x.sum(1, keepdims=True) for x in (evidence.counts_LE, evidence.weights_LE))
        each = np.take_along_axis(share, widths_LE[..., None], 2)[..., 0] ** 2 * phi * w**1.5
        return each[evidence.there_LE].sum()

    assert loss(mc_moe(evidence, 2300, scope="model")) <= loss(mc_moe(evidence, 2300)) * (1 + 1e-5)


def test_weights_errors_are_what_mc_sharp_reads(evidence):
    other = replace(evidence, output_LEW=np.zeros_like(evidence.output_LEW))
    assert np.array_equal(mc_sharp(other, 2300), mc_sharp(evidence, 2300))
    assert np.array_equal(mc_sharp(evidence, 2300), mc_moe(evidence, 2300)), "here both errors are in proportion"


def test_ranks(evidence):
    for method, score_LE in ((quantmoe_bench, evidence.outlier_LE), (frequency, evidence.counts_LE)):
        widths_LE = method(evidence, 1600 + 3 * 120)
        assert set(zip(*np.nonzero(widths_LE == 2), strict=True)) == {
            tuple(np.unravel_index(i, (3, 6))) for i in np.argsort(-np.where(evidence.there_LE, score_LE, -1), axis=None, kind="stable")[:3]
        }  # fmt: skip


def test_the_layer_that_turns_the_stream_most_comes_first(evidence):
    assert (block_importance(evidence, 1600 + 6 * 120) == 2 * np.eye(3, dtype=int)[1][:, None]).all()
    widths_LE = block_importance(evidence, 1600 + 8 * 120)
    assert (widths_LE[1] == 2).all() and (widths_LE[2] == 2).sum() == 2 and not widths_LE[0].any()
    with pytest.raises(InputError, match="--probe residual"):
        block_importance(replace(evidence, turned_L=None), 2300)


def test_a_layer_of_small_worth_gives_its_bits_away(evidence):
    """Two layers with the same relative errors: the one that adds little to the stream has the fewest bits."""
    whole = replace(evidence, there_LE=np.ones((3, 6), bool), output_LEW=np.broadcast_to(np.array([4.0, 1.0, 0.2]), (3, 6, 3)))
    whole.counts_LE[...] = whole.weights_LE[...] = 5
    whole = replace(whole, energy_L=np.full(3, 9.0), share_L=np.array([0.01, 0.5, 0.5]))
    widths_LE = mc_moe(whole, 18 * 160, scope="model")
    assert widths_LE[0].max() <= widths_LE[1:].min() and widths_LE[0].mean() < 1 < widths_LE[1:].mean()


def test_outliers_are_relative_to_their_column():
    w_RC = np.ones((8, 16), np.float32)
    assert outliers(w_RC) == 1
    w_RC[3, 5] = -9
    assert outliers(w_RC) == outliers(w_RC * np.linspace(1, 5, 16, dtype=np.float32)) == pytest.approx(9 / 2)


def test_what_an_expert_adds_is_its_part_of_the_layers_output():
    rng = np.random.default_rng(3)
    spec = ExpertSpec(8, 16)
    old, new = (
        ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (16, 8), (8, 16)))) for _ in range(2)
    )
    x_nD = rng.standard_normal((5, 8)).astype(np.float32)
    experts_nK = np.array([[0, 1], [1, 2], [2, 0], [1, -1], [0, 2]])
    weights_nK = rng.uniform(0, 1, (5, 2)).astype(np.float32)
    seen = LayerInputs(x_nD, experts_nK, weights_nK)

    def silu(x):
        return x / (1 + np.exp(-x))

    def plain(w, x):
        return (silu(x @ w.gate_FD.T) * (x @ w.up_FD.T)) @ w.down_DF.T

    rows = [(0, 1), (1, 0), (3, 0)]
    for weights in (old, new):
        want_nD = [weights_nK[t, k] * plain(weights, x_nD[t]) for t, k in rows]
        np.testing.assert_allclose(output(seen, 1, spec, weights), want_nD, rtol=1e-4, atol=1e-4)


def measure_or_stop(checkpoint, layout, given, kept, progress):
    codecs = ("int2:32", "int4:32", "int8:32")
    try:
        return measure(checkpoint, layout, given, codecs, "compress.encode.rtn", kept=kept, progress=progress)
    except KeyboardInterrupt:
        assert kept.read()["done_L"].tolist().count(True) == 1
        return None


def test_evidence_of_a_model(tmp_path):
    save_tiny("mixtral", tmp_path / "m", hidden_size=32, intermediate_size=32)
    checkpoint = Checkpoint.open(tmp_path / "m")
    layout, model = describe(checkpoint), open_model(checkpoint)
    documents = [Document("a", "drawn", tokens=np.random.default_rng(i).integers(4, 120, 40).tolist()) for i in range(3)]
    recording = Recording(model, cut(documents, None, length=40), make({"inputs": {}, "counts": {}, "residual": {}}))
    recording.run(model)
    given = Calibration(recording.profile(), layout.facts)
    found = measure(checkpoint, layout, given, ("int2:32", "int4:32", "int8:32"), "compress.encode.rtn")
    assert np.array_equal(found.counts_LE, recording.profile().arrays["counts_LE"])
    assert (np.diff(found.output_LEW) < 0).all() and (np.diff(found.matrix_LEW) < 0).all()
    assert (found.outlier_LE > 1).all()
    arrays = recording.profile().arrays
    assert found.turned_L is not None and found.share_L is not None and found.energy_L is not None
    np.testing.assert_allclose(found.turned_L, arrays["turned_L"] / arrays["turning_L"])
    assert (found.share_L > 0).all() and (found.output_LEW[..., 2].sum(1) < 0.1 * found.energy_L).all()
    kept = EvidenceFile(tmp_path / "kept", {"widths": ["int2:32", "int4:32", "int8:32"]})

    def stop(done: int, of: int) -> None:
        if done == 1 and of > 1:
            raise KeyboardInterrupt

    for progress in (stop, None):
        read = measure_or_stop(checkpoint, layout, given, kept, progress)
    assert read is not None
    for name in ("there_LE", "counts_LE", "weights_LE", "output_LEW", "matrix_LEW", "outlier_LE", "energy_L"):
        assert np.array_equal(getattr(read, name), getattr(found, name)), f"{name}: stopped and gone on is the same"
    arrays = kept.read()
    assert arrays["done_L"].all()
    kept.write(arrays | {"matrix_LEW": arrays["matrix_LEW"] * 2})
    again = measure_or_stop(checkpoint, layout, given, kept, None)
    assert again is not None and np.array_equal(again.matrix_LEW, 2 * found.matrix_LEW), "nothing is measured twice"
    with pytest.raises(InputError, match="evidence with widths"):
        replace(kept, told={"widths": ["int2:32"]}).read()
    better = measure(checkpoint, layout, given, ("int2:32",), "compress.encode.gptq")
    assert better.output_LEW.sum() < found.output_LEW[..., 0].sum(), "fitted to the inputs, the output changes less"
    with pytest.raises(InputError, match="more and more"):
        measure(checkpoint, layout, given, ("int4:32", "int2:32"), "compress.encode.rtn")
    with pytest.raises(InputError, match="multiples"):
        measure(checkpoint, layout, given, ("int4:64",), "compress.encode.rtn")


def test_a_super_expert_has_the_widest_codec_and_the_others_pay_for_it(tmp_path):
    save_tiny("mixtral", tmp_path / "m", hidden_size=32, intermediate_size=32)
    checkpoint = Checkpoint.open(tmp_path / "m")
    layout, model = describe(checkpoint), open_model(checkpoint)
    documents = [Document("a", "drawn", tokens=np.random.default_rng(i).integers(4, 120, 40).tolist()) for i in range(3)]
    recording = Recording(model, cut(documents, None, length=40), make({"inputs": {}, "counts": {}, "maxima": {}}))
    recording.run(model)
    profile, key = recording.profile(), ExpertKey(0, 1)
    profile.arrays["output_most_LE"][key] = 1000 * profile.arrays["output_most_LE"].max()
    weights = sum(la.num_experts * 3 * 32 * 32 for la in layout.facts.layers)
    for protect in (True, False):
        wish = BitsWish(
            "compress.encode.rtn", ("int2:32", "int4:32"), bits=2.7, budget="compress.budget.mc_sharp", protect=protect
        )
        plan = plan_bits(checkpoint, layout, wish, profile=profile).plan
        codec = [plan.encodings[s.encodings[0]].codec for s in plan.layers[0].slots]
        assert plan.sizes[1] <= 2.7 / 8 * weights and plan.protected == ((key,) if protect else ())
        assert not protect or codec[1] == "int4:32"
    with pytest.raises(InputError, match="too few"):
        plan_bits(checkpoint, layout, replace(wish, bits=2.6, protect=True), profile=profile)
    alike = plan_bits(checkpoint, layout, BitsWish("compress.encode.rtn", ("int4:32",)), profile=profile).plan
    assert f"Super Experts are changed like all others: layer 0 expert {key.expert}" in alike.stated
