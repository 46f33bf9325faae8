"""Laws of every criterion, search, budget, grouping, fusing, neuron criterion and sparsifier of the catalogue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moestro.compress.choosing import choose, least
from moestro.compress.sampling import LayerSample
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError, ProfileError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.layer import LayerFacts, RouterFacts
from moestro.core.method import load
from moestro.core.routing import RouteContext, Routing
from tests.laws.cards import cards
from tests.profile.make import layer, profile

E, F = 8, 16
CRITERIA, SEARCHES, BUDGETS, GROUPS, FUSES, NEURONS, SPARSE, SKIPS = (
    [card.name for card in cards(f"moestro.compress.{package}", kind)]
    for package, kind in (
        ("criteria", "criterion"), ("search", "search"), ("budget", "budget"), ("group", "group"), ("fuse", "fuse"),
        ("neurons", "neurons"), ("sparsify", "sparsify"), ("skip", "skip"),
    )
)  # fmt: skip


def made(seed: int = 0, idle: tuple[int, ...] = ()):
    """A profile of two layers with every statistic that compression reads. idle: experts that were never chosen."""
    rng = np.random.default_rng(seed)
    count_LE = rng.integers(10, 90, (2, E))
    x = rng.standard_normal((2, E, 40))
    arrays = {
        "counts_LE": count_LE,
        "mass_LE": count_LE * rng.random((2, E)),
        "norm_LE": count_LE * (1 + rng.random((2, E))),
        "gated_norm_LE": count_LE * rng.random((2, E)),
        "contribution_LE": rng.random((2, E)),
        "selected_logits_LE": rng.standard_normal((2, E)),
        "selected_positive_LE": rng.random((2, E)),
        "output_most_LE": rng.random((2, E)).astype(np.float32),
    }
    for name, array in arrays.items():
        arrays[name] = np.where(np.isin(np.arange(E), idle), 0, array).astype(array.dtype)
    unit = x / np.linalg.norm(x, axis=2, keepdims=True)
    arrays |= {
        "cosine_LEE": 40 * unit @ unit.swapaxes(1, 2),
        "compared_L": np.array([40, 40]),
        "logit_products_LEE": x @ x.swapaxes(1, 2),
        "gated_moment_LED": rng.random((2, E, 32)),
        "gated_hidden_LEF": rng.random((2, E, F)),
    }
    return profile(arrays, layers=(layer(E, 2), layer(E, 2)))


def test_the_catalogue_is_walked():
    assert {"compress.criteria.reap", "compress.criteria.frequency"} <= set(CRITERIA) and all(
        (SEARCHES, BUDGETS, GROUPS, FUSES, NEURONS, SPARSE, SKIPS)
    )


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_one_number_for_each_expert_and_repeat(name):
    fn, stats = load(name), LayerStats(made(), 1)
    score_E = fn(stats)
    assert score_E.shape == (E,) and score_E.dtype == np.float64 and np.isfinite(score_E).all()
    assert np.array_equal(score_E, fn(stats)) and not np.array_equal(score_E, fn(LayerStats(made(), 0)))


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_go_with_their_experts(name):
    """Asked for some experts in another order, the order of any two stays the same."""
    fn, some = load(name), (5, 0, 3)
    whole, part = fn(LayerStats(made(), 0)), fn(LayerStats(made(), 0, some))
    assert part.shape == (3,) and np.array_equal(np.argsort(part), np.argsort(whole[list(some)]))


@pytest.mark.parametrize("name", [n for n in CRITERIA if not n.endswith(".random")])
def test_an_expert_that_was_never_chosen_is_worth_least(name):
    score_E = load(name)(LayerStats(made(idle=(2, 6)), 0))
    assert (score_E[[2, 6]] == 0).all() and (np.delete(score_E, [2, 6]) > 0).all()


@pytest.mark.parametrize("name", [n for n in CRITERIA if not n.endswith(".random")])
def test_without_the_statistic_it_says_which_probe(name):
    with pytest.raises(ProfileError, match="--probe"):
        load(name)(LayerStats(profile({}, layers=(layer(E, 2),)), 0))


def test_closed_forms():
    p = made()
    a, stats = p.arrays, LayerStats(p, 1)
    assert np.array_equal(load("compress.criteria.frequency")(stats), a["counts_LE"][1])
    assert np.array_equal(load("compress.criteria.gate_mass")(stats), a["mass_LE"][1])
    assert np.allclose(load("compress.criteria.reap")(stats), a["gated_norm_LE"][1] / a["counts_LE"][1])
    assert np.allclose(load("compress.criteria.easy_ep")(stats), a["contribution_LE"][1] / a["contribution_LE"][1].sum())
    assert np.array_equal(load("compress.criteria.output_norm")(stats), a["norm_LE"][1])
    raw = load("compress.criteria.premoe")(stats, positive=False)
    assert np.allclose(raw, a["selected_logits_LE"][1] / 100) and (raw < 0).any()


@pytest.mark.parametrize("name", ["compress.criteria.reap"])
def test_reading_a_text_twice_changes_nothing(name):
    once, twice = made(), made()
    twice = replace(twice, arrays={n: 2 * v for n, v in twice.arrays.items()}, tokens_G=(200,))
    assert np.allclose(load(name)(LayerStats(once, 0)), load(name)(LayerStats(twice, 0)))


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_spend_what_there_is(name):
    rng = np.random.default_rng(0)
    for total in (6, 9, 17, 24):
        scores = [rng.random(E) * 10**i for i in range(3)]
        keep = load(name)(scores, total, [2, 2, 2])
        assert sum(keep) == total and all(2 <= k <= E for k in keep)
    for wrong in (5, 25):
        with pytest.raises(InputError):
            load(name)([rng.random(E)] * 3, wrong, [2, 2, 2])


def test_the_threshold_gives_more_to_layers_where_more_experts_matter():
    even, steep = np.ones(E), np.array([100.0, 1, 1, 1, 1, 1, 1, 1])
    assert load("compress.budget.threshold")([even, steep], 9, [1, 1]) == [8, 1]
    scaled = load("compress.budget.threshold")([1000 * even, steep], 9, [1, 1])
    assert scaled == [8, 1]


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_all_used_and_one_each_is_the_identity(name):
    for groups in range(1, E + 1):
        found = load(name)(LayerStats(made(), 0), groups)
        assert sorted(set(found.labels_E.tolist())) == list(range(groups)) and found.alike_EE.shape == (E, E)
        assert np.allclose(np.diag(found.alike_EE), 1)


@pytest.mark.parametrize("name", GROUPS)
def test_duplicates_join_each_other(name):
    """Experts 1 and 6 are alike, whatever their use; nothing else is."""
    p = made()
    for key in ("cosine_LEE", "logit_products_LEE"):
        array = p.arrays[key].copy()
        array[:, 6] = array[:, 1]
        array[:, :, 6] = array[:, :, 1]
        p.arrays[key] = array  # type: ignore[index]
    p.arrays["counts_LE"][:, 1], p.arrays["counts_LE"][:, 6] = 99, 1
    labels_E = load(name)(LayerStats(p, 0), E - 1).labels_E
    assert labels_E[1] == labels_E[6] and len(set(np.delete(labels_E, 6).tolist())) == E - 1


@pytest.mark.parametrize("name", FUSES)
def test_coefficients_sum_to_one(name):
    for count_E in (np.array([5.0, 3, 0]), np.zeros(4), np.array([7.0])):
        share = load(name)(count_E)
        assert share.sum() == pytest.approx(1) and (share >= 0).all() and len(share) == len(count_E)


def test_fusing_closed_forms():
    count_E = np.array([6.0, 3, 0, 1])
    assert np.allclose(load("compress.fuse.frequency", "fuse")(count_E), count_E / 10)
    assert np.allclose(load("compress.fuse.average")(count_E), 0.25)
    assert load("compress.fuse.dominant")(count_E).tolist() == [1, 0, 0, 0]


def test_choosing_keeps_the_best_of_every_group_and_the_protected():
    facts = LayerFacts(0, 0, E, 2, ExpertSpec(4, 4), RouterFacts("sigmoid", groups=2, groups_kept=1, selection_bias=True))
    score_E = np.array([1.0, 2, 3, 4, 40, 30, 20, 10])
    assert least(facts) == 4 and choose(score_E, 4, facts) == [2, 3, 4, 5]
    assert choose(score_E, 4, facts, {0, 7}) == [0, 3, 4, 7]
    for keep, protected, said in ((5, (), "groups"), (2, (0, 1), "protected")):
        with pytest.raises(InputError, match=said):
            choose(score_E, keep, facts, protected)
    with pytest.raises(InputError, match="not numbers"):
        choose(score_E * np.nan, 4, facts)
    plain = replace(facts, router=RouterFacts("softmax"))
    assert least(plain) == 2 and choose(score_E, 3, plain) == [4, 5, 6] and choose(np.ones(E), 3, plain) == [0, 1, 2]


def sample(seed: int = 0) -> LayerSample:
    """Expert 5 is a copy of 2, and the router never likes 7."""
    rng = np.random.default_rng(seed)
    facts = LayerFacts(0, 0, E, 2, ExpertSpec(6, 4), RouterFacts("softmax", renormalised=True))
    logits_nE = rng.standard_normal((30, E)).astype(np.float32)
    logits_nE[:, 7] = -30
    outputs_EnD = rng.standard_normal((E, 30, 6)).astype(np.float32)
    outputs_EnD[5] = outputs_EnD[2]
    return LayerSample(facts, logits_nE, None, outputs_EnD)


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_find_the_set_that_costs_least(name):
    from itertools import combinations

    fn, one = load(name), sample()
    whole_nD = one.output(range(E))
    assert fn(one, E) == (list(range(E)), 0.0)
    kept, loss = fn(one, E - 1)
    assert kept == [0, 1, 2, 3, 4, 5, 6] and loss < 1e-9, "what is never chosen costs nothing"
    kept, loss = fn(one, 5)
    every = {s: one.loss(s, whole_nD) for s in combinations(range(E), 5)}
    assert loss == pytest.approx(min(every.values())) and every[tuple(kept)] == pytest.approx(loss)
    greedy, more = fn(one, 5, most=0)
    assert len(greedy) == 5 and loss - 1e-9 <= more < np.mean(list(every.values()))
    for most in (0, 500):
        assert 7 in fn(one, 5, protected={7}, most=most)[0]
    with pytest.raises(InputError):
        fn(one, 1)


def weights(seed: int = 0) -> ExpertWeights:
    rng = np.random.default_rng(seed)
    gate, up = rng.standard_normal((2, F, 32)).astype(np.float32)
    return ExpertWeights(gate, up, rng.standard_normal((32, F)).astype(np.float32))


@pytest.mark.parametrize("name", NEURONS)
def test_dead_neurons_are_worth_nothing_and_scores_go_with_their_neurons(name):
    fn, w, norm_F = load(name), weights(), np.random.default_rng(1).random(F)
    norm_F[3] = 0
    score_F = fn(norm_F, w)
    assert score_F.shape == (F,) and score_F[3] == 0 and (np.delete(score_F, 3) > 0).all()
    order = np.random.default_rng(2).permutation(F)
    moved = ExpertWeights(w.gate_FD[order], w.up_FD[order], w.down_DF[:, order])  # type: ignore[index]
    assert np.allclose(fn(norm_F[order], moved), score_F[order])
    assert (fn(np.zeros(F), w) > 0).all(), "an expert that saw nothing is judged by its weights"


@pytest.mark.parametrize("name", SPARSE)
def test_sparsifiers_keep_shape_and_do_not_depend_on_the_scale_of_gates(name):
    fn, w_RC = load(name), weights().up_FD.astype(np.float32)
    norm_C = np.random.default_rng(3).random(32)
    out = fn(w_RC, norm_C)
    assert out.shape == w_RC.shape and out.dtype == np.float32 and np.isfinite(out).all()
    assert np.array_equal(out, fn(w_RC, 7.5 * norm_C)) and np.array_equal(fn(w_RC, np.zeros(32)), fn(w_RC, np.ones(32)))
    assert not (w_RC == 0).any(), "the input is left alone"


def test_moe_pruner_is_wanda_with_gated_inputs():
    fn, rng = load("compress.sparsify.moe_pruner"), np.random.default_rng(4)
    w_RC, x_nC, g_n = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((20, 8)), rng.random(20)
    norm_C = np.sqrt(((x_nC * g_n[:, None]) ** 2).sum(0))
    score_RC = np.abs(w_RC) * norm_C
    out = fn(w_RC, norm_C, ratio=0.4)
    for row in range(5):
        gone = np.argsort(score_RC[row])[:3]
        assert set(np.flatnonzero(out[row] == 0)) == set(gone.tolist())
    pattern = fn(w_RC, norm_C, pattern="2:4").reshape(5, 2, 4)
    assert ((pattern != 0).sum(2) == 2).all()
    top = np.sort(score_RC.reshape(5, 2, 4), axis=2)[:, :, 2:]
    assert np.allclose(np.sort(np.where(pattern != 0, score_RC.reshape(5, 2, 4), 0), axis=2)[:, :, 2:], top)
    assert np.array_equal(fn(w_RC, norm_C, ratio=0.0), w_RC)
    for bad in ({"ratio": 1.0}, {"pattern": "4:2"}, {"pattern": "2:3"}, {"pattern": "x"}):
        with pytest.raises(InputError):
            fn(w_RC, norm_C, **bad)


def test_low_rank_and_the_rows_it_misses():
    fn, rng = load("compress.sparsify.low_rank"), np.random.default_rng(5)
    w_RC = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 10))
    assert np.allclose(fn(w_RC.astype(np.float32), np.ones(10), rank=3, kept=0.0), w_RC, atol=1e-4), "planted low rank is free"
    w_RC = rng.standard_normal((12, 10)).astype(np.float32)
    for options in ({"rank": 10, "kept": 0.0}, {"rank": 1, "kept": 1.0}):
        assert np.allclose(fn(w_RC, np.ones(10), **options), w_RC, atol=1e-5)
    singular = np.linalg.svd(w_RC, compute_uv=False)
    assert np.linalg.norm(fn(w_RC, np.ones(10), rank=4, kept=0.0) - w_RC) == pytest.approx(np.linalg.norm(singular[4:]), rel=1e-4)
    exact = (np.abs(fn(w_RC, np.ones(10), rank=2, kept=0.25) - w_RC) < 1e-5).all(1)
    assert exact.sum() == 3
    with pytest.raises(InputError):
        fn(w_RC, np.ones(10), rank=0)


@pytest.mark.parametrize("name", SKIPS)
@pytest.mark.parametrize("renormalised", [True, False])
def test_skips_give_every_layer_a_tap_that_leaves_the_heaviest(name, renormalised):
    rng = np.random.default_rng(0)
    arrays = {"weight_ratios_LKR": rng.integers(0, 9, (2, 3, 1024)), "rank_mass_LK": np.sort(rng.random((2, 3)))[:, ::-1]}
    found = profile(arrays, layers=(layer(E, 3), layer(E, 3)))
    facts = [LayerFacts(i, i, E, 3, ExpertSpec(32, F), RouterFacts("softmax", renormalised=renormalised)) for i in range(2)]
    made = load(name, "skip")([LayerStats(found, i) for i in range(2)], facts)
    assert made == load(name, "skip")([LayerStats(found, i) for i in range(2)], facts) and len(made) == 2
    weights_TK = rng.random((30, 3)).astype(np.float32)
    ids_TK = np.stack([rng.permutation(E)[:3] for _ in range(30)])
    for use, share in made:
        assert share is None or 0 <= share < 1
        after = load(use.tap, "tap")(None, **use.settings)(Routing(ids_TK, weights_TK), RouteContext())
        assert (np.take_along_axis(after.experts_TK, weights_TK.argmax(1)[:, None], 1) >= 0).all(), "the heaviest stays"
        assert ((after.experts_TK == ids_TK) | (after.experts_TK < 0)).all(), "nothing is added"
        if renormalised:
            np.testing.assert_allclose(after.weights_TK.sum(1), weights_TK.sum(1), rtol=1e-5)
        else:
            assert ((after.weights_TK == weights_TK) | (after.weights_TK == 0)).all()


@pytest.mark.parametrize("name", ["compress.group.m_smoe", "compress.group.output_similarity"])
def test_the_most_used_lead_a_group_each(name):
    for seed in range(3):
        p = made(seed)
        found = load(name)(LayerStats(p, 1), 3)
        leaders = np.argsort(-p.arrays["counts_LE"][1], kind="stable")[:3]
        assert len(set(found.labels_E[leaders].tolist())) == 3, "no two of the three most used are in one group"
        for e in range(E):
            assert found.labels_E[e] == found.labels_E[leaders[np.argmax(found.alike_EE[e, leaders])]], "the nearest leader's"
        if name.endswith("m_smoe"):
            assert found.alike_EE.min() >= 0, "a likeness of logits from 0 to 1, as the paper has it"


def test_lots_depend_on_the_seed():
    fn, stats = load("compress.criteria.random"), LayerStats(made(), 0)
    assert not np.array_equal(fn(stats, seed=1), fn(stats, seed=2))


def test_rows_that_low_rank_keeps_are_those_whose_inputs_are_loud():
    fn, differ = load("compress.sparsify.low_rank"), 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        w_RC, norm_C = rng.standard_normal((8, 6)).astype(np.float32), np.exp(2 * rng.standard_normal(6))
        u_RK, s_K, v_KC = np.linalg.svd(w_RC.astype(np.float64), full_matrices=False)
        rest_RC = w_RC - (u_RK[:, :2] * s_K[:2]) @ v_KC[:2]
        row, deaf = (int(np.argmax(np.linalg.norm(rest_RC * n, axis=1))) for n in (norm_C, 1.0))
        out = fn(w_RC, norm_C, rank=2, kept=1 / 8)
        assert np.flatnonzero(np.abs(out - w_RC).max(1) < 1e-6).tolist() == [row]
        differ += row != deaf
    assert differ >= 2, "without the inputs other rows would be kept"


def test_fewer_keeps_the_most_of_all_ways_to_spend_as_many_experts():
    from itertools import product

    rng = np.random.default_rng(7)
    for total in (3, 5, 7, 9):
        mass_LK = np.sort(rng.random((3, 3)), axis=1)[:, ::-1] * np.array([[1.0], [30.0], [5.0]])  # texts of any length
        found = profile({"rank_mass_LK": mass_LK}, layers=tuple(layer(E, 3) for _ in range(3)))
        facts = [LayerFacts(i, i, E, 3, ExpertSpec(32, F), RouterFacts("softmax")) for i in range(3)]
        made = load("compress.skip.fewer", "skip")([LayerStats(found, i) for i in range(3)], facts, average=total / 3)
        numbers = [use.settings["number"] for use, _ in made]
        share_LK = mass_LK / mass_LK.sum(1, keepdims=True)
        kept = {
            ks: sum(share_LK[i, :k].sum() for i, k in enumerate(ks)) for ks in product((1, 2, 3), repeat=3) if sum(ks) == total
        }
        assert sum(numbers) == total and kept[tuple(numbers)] == pytest.approx(max(kept.values()))


@pytest.mark.parametrize("name", ["compress.skip.odp", "compress.skip.ratio"])
def test_protected_tokens_keep_all_their_experts(name):
    rng = np.random.default_rng(8)
    found = profile({"weight_ratios_LKR": rng.integers(1, 9, (1, 3, 1024))}, layers=(layer(E, 3),))
    facts = [LayerFacts(0, 0, E, 3, ExpertSpec(32, F), RouterFacts("softmax"))]
    whole = {"share": 1.0} if name.endswith("odp") else {"threshold": 1.0}
    routing = Routing(np.tile(np.arange(3), (10, 1)), rng.random((10, 3)).astype(np.float32))
    x_TD = rng.standard_normal((10, 32)).astype(np.float32)
    for protect, number in ((0.0, 0), (0.25, 3), (1.0, 10)):
        ((use, _),) = load(name, "skip")([LayerStats(found, 0)], facts, protect=protect, **whole)
        after = load(use.tap, "tap")(None, **use.settings)(routing, RouteContext(x_TD=x_TD))
        loud = np.argsort(-np.abs(x_TD).sum(1))[:number]
        used_T = (after.experts_TK >= 0).sum(1)
        assert (used_T[loud] == 3).all() and (np.delete(used_T, loud) == 1).all()


@pytest.mark.parametrize("role", ["gate_FD", "up_FD", "down_DF"])
def test_an_order_that_one_matrix_alone_shows_is_found(role):
    w, order = weights(1), np.random.default_rng(9).permutation(F)
    still = {"gate_FD": np.zeros((F, 32)), "up_FD": np.zeros((F, 32)), "down_DF": np.zeros((32, F))}
    array = getattr(w, role)
    first = ExpertWeights(**{**still, role: array})
    moved = ExpertWeights(**{**still, role: array[order] if role != "down_DF" else array[:, order]})
    found_F = load("compress.fuse.alignment", "align")(first, moved)
    assert np.array_equal(order[found_F], np.arange(F))
