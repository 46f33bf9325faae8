"""Each method finds what was planted, and its ablation, the same method without its idea, does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from moestro.compress.executor import compress
from moestro.compress.live import compress_live
from moestro.compress.merging import Grouping
from moestro.compress.planner import Wish, plan_compression
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError, PlanError
from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.method import load
from moestro.models.experts import read_expert
from moestro.models.families import describe
from moestro.models.open import open_model
from tests.compress.conftest import Saved
from tests.profile.make import layer, profile

RNG = np.random.default_rng(0)


def shared_experts(groups: int, each: int, rank: int, f: int = 12, d: int = 24) -> list[ExpertWeights]:
    """Experts whose gates and ups read `rank` directions, the same within a group."""
    rng, out = np.random.default_rng(1), []
    for _ in range(groups):
        bases = rng.standard_normal((2, rank, d))
        for _ in range(each):
            gate, up = (rng.standard_normal((f, rank)) @ basis for basis in bases)
            out.append(
                ExpertWeights(gate.astype(np.float32), up.astype(np.float32), rng.standard_normal((d, f)).astype(np.float32))
            )
    return out


def missed(experts: list[ExpertWeights], rank: int, group: int) -> float:
    """|W - A B|^2 / |W|^2 over gates and ups."""
    bases = load("latent", "share")([lambda w=w: w for w in experts], rank=rank, group=group)
    lost = total = 0.0
    for w, basis in zip(experts, bases, strict=True):
        for role, matrix in (("gate", w.gate_FD), ("up", w.up_FD)):
            assert matrix is not None
            lost += float(np.square(matrix - matrix @ basis[role].T @ basis[role]).sum())
            total += float(np.square(matrix).sum())
    return lost / total


def test_shared_directions_are_found_by_the_right_groups_alone():
    experts = shared_experts(groups=2, each=3, rank=5)
    assert missed(experts, 5, 3) < 1e-9
    assert missed(experts, 5, 0) > 0.1 and missed(experts, 5, 2) > 0.02, "one basis for all, or groups across the planted ones"
    assert missed(experts, 10, 0) < 1e-9, "both groups' directions together"
    assert missed(experts, 24, 0) < 1e-9 and missed(experts, 4, 3) > 1e-4
    losses = [missed(experts, m, 0) for m in (2, 4, 6, 8)]
    assert losses == sorted(losses, reverse=True)


def test_no_other_shared_projection_is_nearer():
    """Eckart-Young: what is lost is the discarded singular values, and drawn projections lose more."""
    rng = np.random.default_rng(2)
    experts = [ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in ((6, 10), (6, 10), (10, 6)))) for _ in range(3)]
    basis = load("latent", "share")([lambda w=w: w for w in experts], rank=4)[0]["up"]
    stacked = np.concatenate([w.up_FD for w in experts]).astype(np.float64)
    lost = np.square(stacked - stacked @ basis.T @ basis).sum()
    assert lost == pytest.approx(np.square(np.linalg.svd(stacked, compute_uv=False)[4:]).sum(), rel=1e-6)
    for _ in range(20):
        drawn, _ = np.linalg.qr(rng.standard_normal((10, 4)))
        assert np.square(stacked - stacked @ drawn @ drawn.T).sum() > lost


def test_latent_plans_are_carried_out_alike(saved, tmp_path):
    one: Saved = saved("olmoe")
    plan = plan_compression("latent", one.checkpoint, one.layout, Wish(options={"rank": 8, "group": 4}))
    made = compress(plan, one.checkpoint, one.layout, tmp_path / "out")
    live, read = compress_live(plan, open_model(one.checkpoint)), open_model(made.checkpoint)
    ids = [[5, 6, 7, 8]]
    assert torch.equal(next(iter(live.run(ids))).logits_TV, next(iter(read.run(ids))).logits_TV)
    found = [read_expert(made.checkpoint, describe(made.checkpoint), ExpertKey(0, e)) for e in range(4)]
    assert np.linalg.matrix_rank(np.concatenate([w.up_FD for w in found]), tol=1e-4) == 8
    assert np.array_equal(found[0].down_DF, read_expert(one.checkpoint, one.layout, ExpertKey(0, 0)).down_DF)
    with pytest.raises(InputError, match="divisor"):
        bad = plan_compression("latent", one.checkpoint, one.layout, Wish(options={"group": 3}))
        compress(bad, one.checkpoint, one.layout, tmp_path / "bad")
    late = plan_compression("latent", one.checkpoint, one.layout, Wish(), base=plan)
    with pytest.raises(PlanError, match="first encoding"):
        compress(late, one.checkpoint, one.layout, tmp_path / "late")


def grouping(method: str, arrays: dict[str, np.ndarray], groups: int) -> Grouping:
    made = profile(arrays, layers=(layer(8, 2),))
    return load(method, "group")(LayerStats(made, 0), groups)


def routed_alike() -> dict[str, np.ndarray]:
    """Eight experts in four pairs: the router's logits of a pair rise and fall together; one of each pair is used much more."""
    rng = np.random.default_rng(3)
    signal = np.repeat(rng.standard_normal((4, 200)), 2, axis=0) + 0.05 * rng.standard_normal((8, 200))
    return {"logit_products_LEE": (signal @ signal.T)[None], "counts_LE": np.array([[90, 5, 6, 80, 7, 70, 60, 8]])}


@pytest.mark.parametrize("method", ["m_smoe", "uncurl"])
def test_experts_that_routers_take_for_one_another_are_grouped(method):
    found = grouping(method, routed_alike(), 4).labels_E
    assert [found[2 * i] == found[2 * i + 1] for i in range(4)] == [True] * 4 and len(set(found.tolist())) == 4
    blind = routed_alike()
    blind["logit_products_LEE"] = np.eye(8)[None]
    other = grouping(method, blind, 4).labels_E
    assert sum(other[2 * i] == other[2 * i + 1] for i in range(4)) < 4, "without the logits they are not"


def test_frequent_experts_weigh_more_in_a_merge():
    """Of an expert used 99 times and a broken one used once the merge must answer like the first; an average does not."""
    good, broken = RNG.standard_normal((2, 16))
    shares = {name: load(name, "fuse")(np.array([99.0, 1.0])) for name in ("frequency", "average", "dominant")}
    far = {name: np.linalg.norm(s[0] * good + s[1] * broken - good) for name, s in shares.items()}
    assert far["dominant"] <= far["frequency"] < 0.1 * far["average"]
    even = {name: load(name, "fuse")(np.array([50.0, 50.0])) for name in shares}
    halves = [np.linalg.norm(s[0] * good + s[1] * broken - (good + broken) / 2) for s in (even["frequency"], even["dominant"])]
    assert halves[0] < 1e-9 < halves[1], "of two used alike the dominant forgets one"


def lost(pruned_RC: np.ndarray, w_RC: np.ndarray, x_nC: np.ndarray, gate_n: np.ndarray) -> float:
    """How far the expert's part of the layer's output is from what it was."""
    return float(np.linalg.norm(gate_n[:, None] * (x_nC @ (pruned_RC - w_RC).T)))


def test_gates_and_inputs_tell_which_weights_can_go():
    """Inputs of very different size, and tokens that the router hardly weighs: magnitude < Wanda < with the router's hints."""
    rng = np.random.default_rng(4)
    w_RC = rng.standard_normal((12, 32)).astype(np.float32)
    x_nC = rng.standard_normal((300, 32)) * np.exp(rng.standard_normal(32))
    gate_n = np.where(np.arange(300) < 150, 0.02, 1.0)
    x_nC[:150, :16] *= 12.0  # loud, but on tokens whose gate is near 0
    fn = load("moe_pruner", "sparsify")
    router, wanda = (np.sqrt(np.square(x_nC * g[:, None]).sum(0)) for g in (gate_n, np.ones(300)))
    found = {name: lost(fn(w_RC, norm_C, ratio=0.5), w_RC, x_nC, gate_n) for name, norm_C in
             (("router", router), ("wanda", wanda), ("magnitude", np.ones(32)), ("random", rng.random(32) * 9))}  # fmt: skip
    assert found["router"] < 0.95 * found["wanda"] and found["router"] < 0.95 * min(found["magnitude"], found["random"])


def test_low_rank_needs_its_rows_where_they_were_planted():
    rng = np.random.default_rng(5)
    w_RC = (rng.standard_normal((20, 3)) @ rng.standard_normal((3, 16))).astype(np.float32)
    w_RC[[4, 11]] += 5 * rng.standard_normal((2, 16)).astype(np.float32)
    fn, norm_C = load("low_rank", "sparsify"), np.ones(16)
    with_rows, without = (np.linalg.norm(fn(w_RC, norm_C, rank=5, kept=kept) - w_RC) for kept in (0.1, 0.0))
    assert with_rows < 1e-3 and without < 1e-3, "five directions hold three and two rows"
    with_rows, without = (np.linalg.norm(fn(w_RC, norm_C, rank=3, kept=kept) - w_RC) for kept in (0.4, 0.0))
    assert with_rows < 0.5 * without
    drawn, _ = np.linalg.qr(rng.standard_normal((16, 3)))
    assert without < np.linalg.norm(w_RC @ drawn @ drawn.T - w_RC), "better than a drawn projection"


def test_neurons_that_answer_stay():
    """Loud neurons that nothing reads, and quiet ones that write much: only the product of both is right."""
    rng = np.random.default_rng(6)
    size_F, out_F = np.exp(rng.standard_normal(40)), np.exp(rng.standard_normal(40))
    hidden_nF = rng.standard_normal((200, 40)) * size_F
    down_DF = (rng.standard_normal((12, 40)) * out_F).astype(np.float32)
    weights = ExpertWeights(None, rng.standard_normal((40, 12)).astype(np.float32), down_DF)
    norm_F = np.linalg.norm(hidden_nF, axis=0)

    def error(score_F: np.ndarray) -> float:
        gone = np.argsort(score_F)[:20]
        return float(np.linalg.norm(hidden_nF[:, gone] @ down_DF[:, gone].T))

    whole = error(load("contribution", "neurons")(norm_F, weights))
    assert whole < 0.8 * min(error(norm_F), error(np.linalg.norm(down_DF, axis=0)), *(error(rng.random(40)) for _ in range(5)))


def test_layers_that_need_more_experts_get_them():
    """One layer's use is spread, the other's is on two experts: the threshold gives the first what the second does not miss."""
    spread, narrow = np.full(8, 12.0), np.array([48.0, 46.0, 1, 1, 0, 0, 0, 0])
    scores = [spread, narrow]

    def removed(counts: list[int]) -> float:
        return sum(1 - np.sort(s)[::-1][:k].sum() / s.sum() for s, k in zip(scores, counts, strict=True))

    found = {name: load(name, "budget")(scores, 10, [2, 2]) for name in ("threshold", "uniform")}
    assert found["threshold"] == [8, 2] and found["uniform"] == [5, 5]
    assert removed(found["threshold"]) < 0.1 < removed(found["uniform"])


def test_scores_weigh_what_frequency_cannot_see():
    """An expert that is chosen often and answers nothing, and one that is rare and loud: REAP keeps the second, frequency the first."""
    counts = np.array([[90, 80, 70, 10]])
    arrays = {"counts_LE": counts, "gated_norm_LE": counts * np.array([[1.0, 1.0, 0.01, 9.0]]), "norm_LE": counts * 1.0, "mass_LE": counts * 0.5}  # fmt: skip
    stats = LayerStats(profile(arrays, layers=(layer(4, 2),)), 0)
    worst = {name: int(np.argmin(load(name, "criterion")(stats))) for name in ("reap", "frequency", "gate_mass")}
    assert worst == {"reap": 2, "frequency": 3, "gate_mass": 3}


def test_a_plan_without_its_method_is_another_plan(saved):
    """Changing only the taps or the encodings of a plan is seen by `diff`."""
    one = saved("olmoe")
    plan = plan_compression("ratio", one.checkpoint, one.layout, Wish())
    bare = replace(plan, layers=tuple(replace(la, taps=()) for la in plan.layers))
    assert any("taps" in at for at, _, _ in plan.diff(bare))
