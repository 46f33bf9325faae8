"""Each probe against what the model computed, by other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moestro.core.experts import ExpertKey
from moestro.core.layer import LayerRecord
from moestro.core.routing import Routing
from moestro.models.open import open_model
from moestro.profile.data import cut
from moestro.profile.measures.redundancy import cka
from moestro.profile.probe import Setting, make
from moestro.profile.probes.residual import turning
from moestro.profile.probes.similarity import unbiased_hsic
from moestro.profile.run import Recording
from moestro.profile.seen import SeenLayer
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny

FAMILIES = ("olmoe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoe")


def running(folder, family="olmoe", **changes):
    torch.set_num_threads(1)
    save_tiny(family, folder, **changes)
    rng = np.random.default_rng(1)
    texts = cut([Document("ab"[i % 2], "s", tokens=rng.integers(4, 100, 20).tolist()) for i in range(3)], None, length=20)
    return open_model(folder), texts


def recorded(model, texts, **probes):
    recording = Recording(model, texts, make(probes))
    recording.run(model)
    return recording.profile()


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return running(tmp_path_factory.mktemp("olmoe"))


def passes(model, texts):
    """Per sequence what the module itself says: records with inputs, and logits."""
    return [next(iter(model.run([s.tokens_T.tolist()], inputs=True))) for s in texts.sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_the_layers_own_experts(family, tmp_path):
    model, texts = running(tmp_path, family)
    made = recorded(model, texts, norms={}, maxima={}, gates={}, counts={})
    wanted = np.zeros_like(made.arrays["norm_LE"])
    gated, largest = wanted.copy(), wanted.copy()
    for output in passes(model, texts):
        for record in output.records:
            experts, routing = model.layers[record.ordinal].experts, record.routing
            total = torch.zeros_like(record.y_TD)
            for t in range(routing.tokens):
                for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t].tolist()):
                    x_1D = record.x_TD[t : t + 1]
                    y_D = experts.output(x_1D * w if experts.spec.weigh_input else x_1D, e)[0]
                    factor = 1.0 if experts.spec.weigh_input else w
                    total[t] += factor * y_D
                    wanted[record.ordinal, e] += y_D.norm().item()
                    gated[record.ordinal, e] += abs(factor) * y_D.norm().item()
                    largest[record.ordinal, e] = max(largest[record.ordinal, e], y_D.abs().max().item())
            assert torch.allclose(total, record.y_TD, atol=1e-4, rtol=1e-3)
    assert np.allclose(made.arrays["norm_LE"], wanted, rtol=1e-4, atol=1e-4)
    assert np.allclose(made.arrays["gated_norm_LE"], gated, rtol=1e-4, atol=1e-4)
    assert np.allclose(made.arrays["output_most_LE"], largest, rtol=1e-4, atol=1e-4)
    assert np.array_equal(made.arrays["worked_LE"], made.arrays["counts_LE"])


def test_cheap_statistics_agree_with_each_other(olmoe):
    made = recorded(
        *olmoe, counts={}, gates={}, coactivation={}, transitions={}, usage={}, sequences={}, tokens={}, positions={}, loss={}
    ).arrays
    counts = made["counts_LE"]
    assert counts.sum() == 3 * 60 * 4 and (made["empty_L"] == 0).all()
    assert np.array_equal(made["ranks_LKE"].sum(1), counts)
    assert np.array_equal(np.diagonal(made["together_LEE"], axis1=1, axis2=2), counts)
    assert np.array_equal(made["together_LEE"], made["together_LEE"].swapaxes(1, 2))
    assert np.array_equal(made["together_LEE"].sum(2), 4 * counts)
    for name in ("usage_GLE", "sequence_counts_SLE", "by_token_ILE", "by_position_PLE"):
        assert np.array_equal(made[name].sum(0), counts), name
    assert np.allclose(made["usage_mass_GLE"].sum(0), made["mass_LE"]) and np.allclose(
        made["rank_mass_LK"].sum(1), made["mass_LE"].sum(1)
    )
    assert (np.diff(made["rank_mass_LK"], axis=1) <= 0).all()
    assert np.array_equal(made["next_LEE"].sum((1, 2)), [60 * 16] * 2) and np.array_equal(
        made["next_first_LEE"].sum((1, 2)), [60] * 2
    )
    assert made["token_counts_I"].sum() == made["position_tokens_P"].sum() == made["sequence_tokens_S"].sum() == 60


def test_transitions_equal_the_traces_own(olmoe):
    made = recorded(*olmoe, transitions={})
    for layer in range(2):
        assert np.array_equal(made.arrays["next_LEE"][layer], made.trace.transitions(layer))


def test_mass_is_that_of_the_runner(olmoe):
    made, wanted = recorded(*olmoe, gates={}).arrays["mass_LE"], np.zeros((3, 8))
    for output in passes(*olmoe):
        for record in output.records:
            np.add.at(wanted[record.ordinal], record.routing.experts_TK.numpy(), record.routing.weights_TK.double().numpy())
    assert np.allclose(made, wanted, atol=1e-6)


def test_loss_is_cross_entropy(olmoe):
    model, texts = olmoe
    made = recorded(model, texts, loss={}).arrays
    nats = np.zeros(2)
    for output, s in zip(passes(model, texts), texts.sequences):
        target = torch.from_numpy(s.tokens_T[1:].astype(np.int64))
        nats[s.labels_T[0]] += torch.nn.functional.cross_entropy(output.logits_TV[:-1].double(), target, reduction="sum").item()
    assert np.allclose(made["nats_G"], nats, rtol=1e-6) and made["predicted_G"].tolist() == [38, 19]


def test_entropy_and_margin(olmoe):
    made = recorded(*olmoe, entropy={}).arrays
    logits = torch.stack([torch.cat([o.records[la].routing.logits_TE for o in passes(*olmoe)]) for la in range(3)]).double()
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum(1)
    top = logits.sort(-1, descending=True).values
    margin = top[..., 3] - top[..., 4]
    assert np.allclose(made["entropy_L"], entropy, atol=1e-6) and np.allclose(made["margin_L"], margin.sum(1), atol=1e-6)
    assert np.allclose(made["log_sum_exp_L"], logits.logsumexp(-1).sum(1), atol=1e-6)
    assert np.array_equal(made["margins_LB"][:, 0], (margin < 0.25).sum(1)) and (made["margins_LB"].sum(1) == 60).all()


def test_uniform_logits_are_undecided(olmoe):
    model, _ = olmoe
    probe = make({"entropy": {}})["profile.probes.entropy"]
    statistics = probe.start(Setting(model.facts, ("a",), np.arange(3), 1, 5))
    routing = Routing(np.tile(np.arange(4), (5, 1)), np.full((5, 4), 0.25), np.full((5, 8), 3.0), None)
    probe.update(statistics, None, SeenLayer(model.facts.layers[0], LayerRecord(0, routing), np.arange(5), 8))
    assert statistics["entropy_L"].value()[0] == pytest.approx(5 * np.log(8)) and statistics["margin_L"].value()[0] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_found(family, tmp_path):
    """What the runner calls the stream, plus the block's output (with shared experts), is what the decoder layer passes on."""
    model, _ = running(tmp_path, family)
    seen = {}
    for layer in model.layers:
        layer._seam.block.register_forward_hook(lambda m, a, out, n=layer.facts.ordinal: seen.setdefault(n, []).append(out))
        layer._seam.decoder.register_forward_hook(lambda m, a, out, n=layer.facts.ordinal: seen.setdefault(n, []).append(out))
    (output,) = model.run([list(range(5, 17))], inputs=True)
    scale = getattr(model.module.config, "residual_multiplier", 1.0)
    for record in output.records:
        block, decoder = (out[0] if isinstance(out, tuple) else out for out in seen[record.ordinal])
        wanted = decoder.reshape(record.x_TD.shape) - scale * block.reshape(record.x_TD.shape)
        assert torch.allclose(record.residual_TD, wanted, atol=1e-4), family
        assert not torch.allclose(record.residual_TD, record.x_TD, atol=1e-2)


def seen_layer(y_TD, residual_TD):
    model_layer = type("Facts", (), {"num_experts": 2, "spec": None, "top_k": 1})()
    routing = Routing(np.zeros((len(y_TD), 1), np.int64), np.ones((len(y_TD), 1)))
    record = LayerRecord(0, routing, residual_TD, y_TD, residual_TD)
    return SeenLayer(model_layer, record, np.arange(len(y_TD)), 2)


def test_turning_of_the_stream():
    residual = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    y = np.stack([0 * residual[0], -2 * residual[1], residual[2], -residual[3]])
    assert turning(seen_layer(y, residual)) == pytest.approx([1, -1, 1, 1])


def test_contribution_by_hand(olmoe):
    """sum of max(0, 1 - cos) * g * norm, token by token."""
    model, texts = olmoe
    made = recorded(model, texts, contribution={}, residual={}).arrays
    wanted, similar = np.zeros((3, 8)), np.zeros(3)
    for output in passes(model, texts):
        for r in output.records:
            cosine = torch.nn.functional.cosine_similarity(r.residual_TD.double(), r.residual_TD.double() + r.y_TD, dim=-1)
            similar[r.ordinal] += cosine.sum().item()
            for t in range(r.routing.tokens):
                for e, g in zip(r.routing.experts_TK[t].tolist(), r.routing.weights_TK[t].tolist()):
                    norm = model.layers[r.ordinal].experts.output(r.x_TD[t : t + 1], e).norm().item()
                    wanted[r.ordinal, e] += max(0.0, 1 - cosine[t].item()) * g * norm
    assert np.allclose(made["contribution_LE"], wanted, rtol=1e-4, atol=1e-5)
    assert np.allclose(made["similarity_L"], similar, atol=1e-4)


def test_moments_are_those_of_the_inputs(olmoe):
    model, texts = olmoe
    made = recorded(model, texts, moments={"full": True}).arrays
    wanted = np.zeros((3, 8, 32, 32))
    gated = np.zeros((3, 8, 32))
    for output in passes(model, texts):
        for r in output.records:
            for t in range(r.routing.tokens):
                x = r.x_TD[t].double().numpy()
                for e, g in zip(r.routing.experts_TK[t].tolist(), r.routing.weights_TK[t].double().tolist()):
                    wanted[r.ordinal, e] += np.outer(x, x)
                    gated[r.ordinal, e] += (g * x) ** 2
    assert np.allclose(made["input_covariance_LEDD"], wanted, atol=1e-6)
    assert np.allclose(made["input_moment_LED"], np.diagonal(wanted, axis1=2, axis2=3), atol=1e-6)
    assert np.allclose(made["gated_moment_LED"], gated, atol=1e-6)


def test_scaling_an_expert_scales_its_norms_and_maxima(tmp_path):
    model, texts = running(tmp_path)
    before = recorded(model, texts, norms={}, maxima={}).arrays
    with torch.no_grad():
        model.layers[2].experts.weights(5).down_DF.mul_(50)  # the last layer, so that nothing else changes
    after = recorded(model, texts, norms={}, maxima={}).arrays
    for name in ("norm_LE", "output_most_LE"):
        ratio = after[name] / np.where(before[name] > 0, before[name], 1)
        assert ratio[2, 5] == pytest.approx(50, rel=1e-5) and np.allclose(ratio[:2], 1) and np.allclose(np.delete(ratio[2], 5), 1)


def test_duplicated_experts_are_alike(tmp_path):
    model, texts = running(tmp_path, hidden_size=64)
    with torch.no_grad():
        experts = model.layers[1].experts
        for field in ("gate_FD", "up_FD", "down_DF"):
            getattr(experts.weights(6), field).copy_(getattr(experts.weights(2), field))
        experts.weights(6).down_DF.mul_(3.0)
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
        for field in ("gate_FD", "up_FD"):
            getattr(experts.weights(7), field).copy_(getattr(experts.weights(4), field))
        experts.weights(7).down_DF.copy_(rotation @ experts.weights(4).down_DF)
    made = recorded(model, texts, similarity={"tokens": 16}).arrays
    cosine = made["cosine_LEE"][1] / made["compared_L"][1]
    found = cka(made["hsic_LEE"][1])
    assert cosine[2, 6] == pytest.approx(1, abs=1e-5) and found[2, 6] == pytest.approx(1, abs=1e-5), "the scale is ignored"
    assert abs(cosine[4, 7]) < 0.3 and found[4, 7] == pytest.approx(1, abs=1e-5), "CKA ignores a rotation, cosine does not"
    assert np.allclose(np.diag(found), 1)


def test_independent_outputs_have_no_hsic():
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        y = rng.standard_normal((2, 8, 5))
        values.append(unbiased_hsic(y @ y.swapaxes(1, 2)))
    mean = np.mean(values, axis=0)
    assert abs(cka(mean)[0, 1]) < 0.05, "unbiased: the biased form would be far above"


def test_neurons_and_sparsity(tmp_path):
    model, texts = running(tmp_path, hidden_act="relu")
    made = recorded(model, texts, neurons={"strongest": 0.25}, sparsity={}, counts={}).arrays
    tokens = made["neuron_tokens_LE"]
    assert np.array_equal(tokens, made["counts_LE"]) and np.array_equal(made["active_LEF"].sum(2), 4 * tokens)
    share = made["fired_LEF"].sum() / (16 * tokens.sum())
    assert 0.3 < share < 0.7, "a random ReLU expert fires about half of the time"
    cett = made["tail_LQ"] / made["tested_L"][:, None]
    kept = made["kept_LQ"] / made["neurons_L"][:, None]
    assert (cett[:, 0] == 0).all() and (kept[:, 0] == 1).all() and (np.diff(kept, axis=1) <= 0).all()
    assert np.allclose(cett[:, -1], 1, atol=1e-6) and (kept[:, -1] == 0).all()
    assert kept[:, 1] == pytest.approx([made["fired_LEF"][la].sum() / made["neurons_L"][la] for la in range(3)], abs=0.01)


def test_marker_tokens_can_be_asked_for(olmoe):
    model, texts = olmoe
    rare = int(texts.frequent()[-1])
    made = recorded(model, texts, tokens={"most": 1, "ids": f"{rare}+127"}).arrays
    assert made["token_ids_I"].tolist() == [rare, 127, int(texts.frequent()[0])]
    assert made["token_counts_I"][1] == 0 and made["token_counts_I"][0] >= 1
    assert made["by_token_ILE"].sum(2)[:, 0].tolist() == (4 * made["token_counts_I"]).tolist()


def test_weights_are_handed_out_by_the_model(olmoe):
    model, _ = olmoe
    assert torch.equal(model.weights(ExpertKey(1, 3)).up_FD, model.layers[1].experts.weights(3).up_FD)
