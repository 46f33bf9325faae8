"""Smoothing and aligned routers: the model stays the same, planted outliers and rare experts cost less than without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moestro.compress.bits import BitsWish, blank, encode_experts, plan_bits
from moestro.compress.calibration import LayerInputs
from moestro.compress.encode.gptq import gptq
from moestro.compress.encode.inputs import Inputs, hidden
from moestro.compress.encode.rtn import rtn
from moestro.compress.encoding import Encoder
from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.smooth.aligned_router import aligned_router, clipped, divergence
from moestro.compress.smooth.eaquant import balanced, eaquant, outliers, powers_of_two
from moestro.compress.smooth.smoothing import Smoothing
from moestro.core.errors import InputError, PlanError, UnsupportedModel
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.plans.compression import Encoding, Slot
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document

TOKENS = np.random.default_rng(5).integers(4, 120, 48).tolist()
SMOOTH, ROUTER = "compress.smooth.eaquant", "compress.smooth.aligned_router"
SPEC = ExpertSpec(64, 64)
SLOTS = [Slot((e,)) for e in range(4)]


def profiled(one):
    model = open_model(one.checkpoint)
    documents = [Document("a", "drawn", tokens=np.random.default_rng(i).integers(4, 120, 40).tolist()) for i in range(4)]
    recording = Recording(model, cut(documents, None, length=40), make({"inputs": {"most": 1000}, "counts": {}}))
    recording.run(model)
    return recording.profile()


def logits(model):
    return next(iter(model.run([TOKENS]))).logits_TV.float().numpy()


@pytest.fixture
def layer():
    """Four experts, their tokens and a router: channel 7 of the inputs is 200 times the others', where weights are small."""
    rng = np.random.default_rng(0)
    x_nD = rng.standard_normal((400, 64)).astype(np.float32)
    x_nD[:, 7] *= 200
    shapes = ((64, 64), (64, 64), (64, 64))
    experts = [ExpertWeights(*(rng.standard_normal(s).astype(np.float32) * 0.1 for s in shapes)) for _ in SLOTS]
    for expert in experts:
        assert expert.gate_FD is not None
        for matrix in (expert.gate_FD, expert.up_FD):
            matrix[:, 7] /= 200
    chosen_nK = np.stack([rng.permutation(4)[:2] for _ in x_nD])
    seen = LayerInputs(x_nD, chosen_nK, np.full((400, 2), 0.5, np.float32))
    router_ED = (rng.standard_normal((4, 64)) * 0.1).astype(np.float32)
    return seen, experts, router_ED


@pytest.mark.parametrize("family", ("mixtral", "qwen2_moe", "deepseek_v3"))
def test_the_model_computes_the_same(saved, family, tmp_path):
    """With shared experts and their gates, and with a bias of the choice."""
    one = saved(family)
    plan = encode_experts(blank(one.checkpoint, one.layout, SMOOTH), one.layout, SMOOTH, "stored")
    model, profile = open_model(one.checkpoint), profiled(one)
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out", encoder=Encoder(plan, one.layout.facts, profile))
    changed = [n for n in one.checkpoint.tensors if not np.array_equal(one.checkpoint.read(n), made.checkpoint.read(n))]
    assert any("post_attention_layernorm" in n for n in changed) and not any("self_attn" in n for n in changed)
    got = logits(open_model(made.checkpoint))
    np.testing.assert_allclose(got, logits(model), atol=1e-4)
    live = compress_live(plan, model, encoder=Encoder(plan, one.layout.facts, profile))
    assert np.array_equal(logits(live), got), "in memory as in a file"


def test_a_planted_outlier_costs_less_in_few_bits(layer):
    """Weights in four bits, activations rounded to eight in blocks, as the kernels do."""
    seen, experts, router_ED = layer
    found = eaquant(seen, SLOTS, lambda i: experts[i], router_ED, SPEC)
    none = replace(found, scale_D=np.ones(64, np.float32), hidden_SF=tuple(np.ones(64, np.float32) for _ in SLOTS))

    def error(smoothing: Smoothing) -> float:
        total = 0.0
        for e, weights in enumerate(experts):
            made = smoothing.applied(e, weights)
            for x_D in seen.x_nD[found.rows[e][:8]]:
                got_F = rtn(made.up_FD, codec="int4:64").reference()(x_D / smoothing.scale_D)
                total += float(np.square(got_F * smoothing.hidden_SF[e] - weights.up_FD @ x_D).sum())
        return total

    assert error(found) < 0.5 * error(none)
    for e, weights in enumerate(experts):
        same = found.applied(e, weights)
        one, other = (hidden(x, w, SPEC) @ w.down_DF.T for x, w in ((seen.x_nD, weights), (seen.x_nD / found.scale_D, same)))
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-3)


def test_the_scale_is_the_largest_that_any_expert_or_the_router_wants(layer):
    seen, experts, router_ED = layer
    with_router, without = (eaquant(seen, SLOTS, lambda i: experts[i], router_ED, SPEC, router=r).scale_D for r in (True, False))
    assert (with_router >= without).all()
    tiny = eaquant(seen, SLOTS, lambda i: experts[i], router_ED * 1e-4, SPEC).scale_D
    assert (tiny > without).any(), "a router of small weights wants larger scales"
    assert np.array_equal(np.log2(with_router), np.rint(np.log2(with_router)))
    even = eaquant(seen, SLOTS, lambda i: experts[i], router_ED, SPEC, alpha=0, router=False).scale_D
    largest = np.max([1 / np.maximum(np.abs(w.up_FD).max(0), np.abs(w.gate_FD).max(0)) for w in experts], axis=0)
    assert np.array_equal(even, powers_of_two(largest)), "alpha 0 looks at weights alone"
    with pytest.raises(InputError, match="alpha"):
        eaquant(seen, SLOTS, lambda i: experts[i], router_ED, SPEC, alpha=2)


def test_only_hidden_units_beyond_the_others_are_scaled():
    h_nF = np.random.default_rng(1).uniform(-1, 1, (200, 32)).astype(np.float32)
    assert (outliers(h_nF, 0.7) == 1).all() and (outliers(h_nF[:0], 0.7) == 1).all()
    h_nF[:, 3] *= 64
    assert outliers(h_nF, 0.7)[3] == pytest.approx(16, rel=0.5) and (np.delete(outliers(h_nF, 0.7), 3) == 1).all()
    assert (outliers(h_nF, 0.0) == 1).all()


def test_every_expert_has_as_many_tokens_as_asked_or_as_there_are():
    rng = np.random.default_rng(2)
    chosen_nK = np.where(rng.random((1000, 1)) < 0.02, 3, rng.integers(0, 3, (1000, 1)))
    seen = LayerInputs(np.zeros((1000, 4), np.float32), chosen_nK, np.ones((1000, 1), np.float32))
    for balance in (0.5, 2.0, 100.0):
        enough = np.ceil(balance * 200 / 4)
        for slot, rows in zip(SLOTS, balanced(seen, SLOTS, balance, 200), strict=True):
            own = seen.own(slot.sources)
            assert set(rows) <= set(own) and len(rows) == len(set(rows)) >= min(enough, len(own))
    few, many = (balanced(seen, SLOTS, balance, 200)[3] for balance in (1e-3, 2.0))
    assert len(few) < len(many), "a rare expert has more of its own"


def test_a_rare_experts_error_falls_with_more_tokens_of_its_own():
    rng = np.random.default_rng(3)
    x_nC = rng.standard_normal((2000, 64)).astype(np.float32) @ rng.standard_normal((64, 64)).astype(np.float32)
    seen = LayerInputs(x_nC, np.where(rng.random((2000, 1)) < 0.1, 3, 0), np.ones((2000, 1), np.float32))
    w_RC = (rng.standard_normal((32, 64)) * 0.1).astype(np.float32)
    own = seen.own((3,))
    errors = []
    for balance in (1e-3, 4.0):
        rows = balanced(seen, SLOTS, balance, 200)[3]
        made = gptq(w_RC, Inputs.of(x_nC[rows]), codec="int3:64").dequantise()
        errors.append(np.square(x_nC[own] @ (made - w_RC).T).sum())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_an_aligned_router_diverges_no_more_than_a_rounded_one(bits):
    rng = np.random.default_rng(4)
    router_ED = rng.standard_t(2.5, (8, 32)).astype(np.float32)
    x_nD = rng.standard_normal((300, 32)).astype(np.float32)
    logits_nE = x_nD @ router_ED.T
    top_nK = np.argsort(-logits_nE, axis=1)[:, :2]
    made, plain = aligned_router(router_ED, x_nD, 2, bits=bits), clipped(router_ED, bits, 1.0)
    one, other = (divergence(logits_nE, x_nD @ r.T, top_nK) for r in (made, plain))
    assert one <= other and (one < other or bits == 8)
    assert all(len(np.unique(row)) <= 2**bits for row in made)
    wide = aligned_router(router_ED, x_nD, 2, bits=bits, ratio=1.0)
    assert divergence(logits_nE, x_nD @ wide.T, np.argsort(-logits_nE, axis=1)) <= divergence(
        logits_nE, x_nD @ made.T, np.argsort(-logits_nE, axis=1)
    )
    with pytest.raises(InputError, match="bits"):
        aligned_router(router_ED, x_nD, 2, bits=1)


def test_a_plan_smooths_then_fits(saved, tmp_path):
    one = saved("mixtral")
    profile, model = profiled(one), open_model(one.checkpoint)
    wish = BitsWish("compress.encode.gptq", ("int8:32",), smooth=SMOOTH, router=ROUTER, router_options={"bits": 4})
    wide = saved("olmoe")
    with pytest.raises(InputError, match="--probe inputs"):
        plan_bits(wide.checkpoint, wide.layout, wish)
    plan = encode_experts(blank(one.checkpoint, one.layout, SMOOTH), one.layout, SMOOTH, "stored")
    routers = tuple(n for n in one.layout.trunk if n.endswith("gate.weight"))
    plan = replace(
        plan, encodings=(*plan.encodings, Encoding(ROUTER, "stored", {"bits": 4})), tensors=dict.fromkeys(routers, (1,))
    )
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out", encoder=Encoder(plan, one.layout.facts, profile))
    assert all(len(np.unique(row)) <= 16 for row in made.checkpoint.read(routers[0]))
    live = compress_live(plan, model, encoder=Encoder(plan, one.layout.facts, profile))
    assert np.array_equal(logits(live), logits(open_model(made.checkpoint)))


def test_what_cannot_be_smoothed_is_refused(saved):
    one = saved("mixtral")
    plan = encode_experts(blank(one.checkpoint, one.layout, SMOOTH), one.layout, SMOOTH, "stored")
    with pytest.raises(PlanError, match="reads inputs"):
        Encoder(plan, one.layout.facts)
    twice = encode_experts(plan, one.layout, SMOOTH, "stored")
    encoder = Encoder(twice, one.layout.facts, profiled(one))
    with pytest.raises(PlanError, match="several times"):
        compress_live(twice, open_model(one.checkpoint), encoder=encoder)
    odd = saved("phimoe")
    plan = encode_experts(blank(odd.checkpoint, odd.layout, SMOOTH), odd.layout, SMOOTH, "stored")
    with pytest.raises(UnsupportedModel, match="what else reads"):
        compress_live(plan, open_model(odd.checkpoint), encoder=Encoder(plan, odd.layout.facts, profiled(odd)))
