"""Each measure finds what was planted, stays at its null on a control, and keeps the closed forms of its paper."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import InputError, ProfileError
from moestro.profile.intervals import bootstrap, wilson
from moestro.profile.measure import apply
from moestro.profile.measures import (
    activation_sparsity,
    affinity,
    balance,
    bits_per_character,
    contrast,
    count_difference,
    critical_mixture_ratio,
    domain_specialisation,
    drop_towards_end,
    early_routing,
    effective,
    efficiency_leverage,
    label_usage,
    multilingual,
    npmi,
    redundancy,
    routers,
    super_experts,
    vocabulary_specialisation,
)
from moestro.profile.profile import Profile
from tests.laws.cards import cards
from tests.profile.make import layer, profile

CARDS = cards("moestro.profile.measures", "measure")


def test_every_measure_needs_a_probe_or_the_trace_or_nothing():
    known = {c.name.rsplit(".", 1)[-1] for c in cards("moestro.profile.probes", "probe")} | {"trace"}
    assert len(CARDS) >= 20 and all(set(c.needs) <= known for c in CARDS)


@pytest.mark.parametrize("card", [c for c in CARDS if c.needs], ids=lambda c: c.name)
def test_a_profile_without_the_statistic_is_refused(card):
    import importlib

    given = {
        "npmi": {"token": 3},
        "early_routing": {"other": "x"},
        "count_difference": {"label": "a"},
        "contrast": {"label": "a", "against": "b"},
    }
    given |= {"multilingual": {"reference": "a"}}
    fn = getattr(importlib.import_module(card.module), card.attribute)
    empty = profile(labels=("a", "b"), tokens_G=(50, 50))
    with pytest.raises(ProfileError, match=r"holds no|has no trace|there is no profile"):
        apply(fn, empty, given.get(card.attribute, {}))


# Loads


def test_balance_at_its_ends():
    even, one = np.full(8, 10), np.array([80, 0, 0, 0, 0, 0, 0, 0])
    assert balance.evenness(even) == pytest.approx((0, 0, 0)) and effective.hill(even) == pytest.approx((8, 8))
    assert balance.evenness(one) == pytest.approx((7, 7 / 8, math.log(8))) and effective.hill(one) == pytest.approx((1, 1))
    assert balance.evenness(np.zeros(8)) == (0, 0, 0) and effective.hill(np.zeros(8)) == (0, 0)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20))
def test_balance_by_definition(loads):
    counts = np.array(loads)
    violation, gini, kl = balance.evenness(counts)
    first, second = effective.hill(counts)
    if counts.sum():
        mean = counts.mean()
        assert violation == pytest.approx(counts.max() / mean - 1)
        assert gini == pytest.approx(np.abs(counts[:, None] - counts[None]).sum() / (2 * len(counts) ** 2 * mean))
        assert kl >= -1e-12 and first == pytest.approx(len(counts) * math.exp(-kl))
        assert 1 - 1e-9 <= second <= first + 1e-9 <= np.count_nonzero(counts) + 2e-9


def test_the_planted_idle_experts_show_in_the_balance(case):
    made = case.profile("counts", "gates")
    assert balance.balance(made).column("never") == pytest.approx([2 / 14] * 2)
    assert all(11 < e <= 12 for e in effective.effective(made).column("by_count")), "12 of 14 are used, about evenly"
    assert all(m < 12 for m in effective.effective(made).column("by_mass"))


def test_routers_in_words(case):
    found = routers.routers(case.profile("entropy", "gates"))
    assert all(0 < e < 0.5 for e in found.column("entropy")), "planted routers are sure"
    assert all(m > 1 for m in found.column("margin")) and found.column("close") == [0, 0]
    assert all(0.5 < h < 0.7 for h in found.column("heaviest"))


# Similar experts


def test_redundancy_finds_planted_twins():
    rng = np.random.default_rng(0)
    hsic = np.eye(4)[None] + 0.01 * rng.random((1, 4, 4))
    hsic[0, 1, 3] = hsic[0, 3, 1] = math.sqrt(hsic[0, 1, 1] * hsic[0, 3, 3])
    arrays = {"hsic_LEE": hsic, "cosine_LEE": 10 * np.eye(4)[None], "compared_L": np.array([10])}
    found = redundancy.redundancy(profile(arrays))
    assert found.column("nearest") == ["1,3"] and found.column("cka_most")[0] == pytest.approx(1)
    assert found.column("redundant") == [0.5] and 2.5 < found.column("kinds")[0] < 3
    assert redundancy.redundancy(profile(arrays | {"hsic_LEE": np.eye(4)[None]})).column("redundant") == [0]


def experts_with(values, layers=5, experts=64):
    largest = np.exp(0.3 * np.random.default_rng(0).standard_normal((layers, experts)))
    for key, value in values.items():
        largest[key] *= value
    return profile({"output_most_LE": largest}, layers=(layer(experts),) * layers)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_super_experts_are_exactly_the_planted_one(scale):
    made = experts_with({(2, 7): 50})
    made = dataclasses.replace(made, arrays={"output_most_LE": made.arrays["output_most_LE"] * scale})
    found = super_experts.super_experts(made)
    assert [row[:2] for row in found.rows] == [(2, 7)]
    assert super_experts.super_experts(made, share=0.2).rows == (), "its layer is not among the first"


def test_nothing_unusual_is_not_super():
    made = experts_with({})
    assert (
        super_experts.super_experts(made).rows == () and "nothing is called super" in super_experts.super_experts(made).notes[0]
    )
    assert len(super_experts.super_experts(made, guard=0.0).rows) >= 1, "the rule alone always names somebody"


@settings(max_examples=30)
@given(st.integers(0, 10**6))
def test_super_experts_are_few(seed):
    largest = np.random.default_rng(seed).pareto(0.7, (4, 64))
    made = profile({"output_most_LE": largest}, layers=(layer(64),) * 4)
    assert len(super_experts.super_experts(made, share=1.0, guard=0.0).rows) <= math.ceil(0.005 * 256)


# From layer to layer


def test_affinity_of_a_permutation_is_one():
    rng = np.random.default_rng(0)
    table = np.zeros((8, 8), int)
    table[np.arange(8), rng.permutation(8)] = rng.integers(5, 50, 8)
    value, chance, information = affinity.predictability(table)
    assert value == 1 and information == pytest.approx(1) and chance == table.max() / table.sum()


def test_affinity_of_independent_layers_is_chance():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    value, chance, information = affinity.predictability(10000 * np.outer([0.7, 0.1, 0.1, 0.1], p))
    assert value == pytest.approx(chance) == pytest.approx(0.4) and information == pytest.approx(0, abs=1e-12)


def test_affinity_of_the_planted_model(case):
    """The heaviest expert of a layer is the token's class, so the next layer's is certain."""
    made = case.profile("transitions")
    (row,) = affinity.affinity(made).rows
    assert row[1] == pytest.approx(1) and row[3] == pytest.approx(1) and row[2] < 0.2
    with pytest.raises(InputError, match="one MoE layer"):
        affinity.affinity(profile({"next_first_LEE": np.zeros((0, 4, 4))}))


# Labels


def test_domains_of_the_planted_model_tell_themselves(case):
    made = case.profile("usage", "sequences", "counts")
    found = domain_specialisation.domain_specialisation(made, draws=50)
    assert found.column("information") == pytest.approx([1, 1])
    assert all(i > 1.5 * n for i, n in zip(found.column("information"), found.column("null_95")))
    shuffled = np.random.default_rng(3).permutation(made.arrays["sequence_label_S"])
    usage = np.stack([made.arrays["sequence_counts_SLE"][shuffled == g + 1].sum(0, dtype=np.int64) for g in range(3)])
    control = dataclasses.replace(made, arrays={**made.arrays, "sequence_label_S": shuffled, "usage_GLE": usage})
    control_found = domain_specialisation.domain_specialisation(control, draws=200)
    assert all(i < n * 1.2 for i, n in zip(control_found.column("information"), control_found.column("null_95")))


def test_ids_of_the_planted_model_tell_their_experts(case):
    made = case.profile("tokens", "counts")
    found = vocabulary_specialisation.vocabulary_specialisation(made, least=4)
    assert found.column("strongest") == [1, 1] == found.column("weighted") and max(found.column("null")) < 0.6
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.multinomial(200, [0.4, 0.3, 0.2, 0.1]) for _ in range(300)])[:, None]
    control = profile({"by_token_ILE": drawn, "token_counts_I": np.full(300, 200), "token_ids_I": np.arange(300)})
    (row,) = vocabulary_specialisation.vocabulary_specialisation(control).rows
    assert row[1] == pytest.approx(row[3], abs=0.01)


@pytest.mark.parametrize("ask", ["npmi", "count_difference", "contrast", "label_usage"])
@pytest.mark.parametrize("g", range(3))
def test_experts_of_a_planted_domain_come_first(case, ask, g):
    made = case.profile("counts", "usage", "sequences", "tokens")
    name, other = "abc"[g], "abc"[(g + 1) % 3]
    found = {
        "npmi": lambda: npmi.npmi(made, label=name, most=8),
        "count_difference": lambda: count_difference.count_difference(made, label=name, most=8, draws=20),
        "contrast": lambda: contrast.contrast(made, label=name, against=other, most=8),
        "label_usage": lambda: label_usage.label_usage(made, label=name, most=4, draws=50),
    }[ask]()
    truth = case.planted.truth
    wanted = {(la, e) for la in range(2) for e in truth.domain_experts(g, la)}
    assert set(zip(found.column("layer"), found.column("expert"))) == wanted
    if ask == "contrast":
        assert min(found.column("low")) > 0 and found.column("delta") == sorted(found.column("delta"), reverse=True)
    if ask == "label_usage":
        assert all(e == 0 and lo <= s <= hi for e, lo, s, hi in zip(*map(found.column, ("elsewhere", "low", "share", "high"))))
        assert all(lo <= s <= hi for lo, s, hi in zip(*map(found.column, ("drawn_low", "share", "drawn_high"))))
    if ask == "npmi":
        # On nowhere else, but each at only some of the domain's tokens: as the formula has it.
        share, of_all = found.column("share_there"), found.column("share_of_all")
        assert found.column("npmi") == pytest.approx([math.log(s / a) / -math.log(a) for s, a in zip(share, of_all)])


def test_npmi_at_its_ends():
    one = npmi.normalised(np.array([[20, 0, 5]]), np.array([[20, 30, 25]]), 20, 100)
    assert one[0, 0] == pytest.approx(1) and one[0, 1] == -1
    assert one[0, 2] == pytest.approx(0), "k = M K / T"
    drawn = npmi.normalised(np.array([[3, 20]]), np.array([[9, 40]]), 20, 100)
    assert ((drawn >= -1) & (drawn <= 1)).all()


def test_npmi_of_marker_tokens(case):
    made = case.profile("counts", "tokens", "usage")
    truth = case.planted.truth
    token = int(made.arrays["token_ids_I"][0])
    found = npmi.npmi(made, token=token, most=4)
    assert set(zip(found.column("layer"), found.column("expert"))) == {
        (la, int(e)) for la in range(2) for e in truth.experts_VLK[token, la]
    }
    assert npmi.npmi(made, token=token, minus=token).column("npmi") == [0] * 10
    with pytest.raises(ProfileError, match="ids=9999"):
        npmi.npmi(made, token=9999)
    with pytest.raises(InputError, match="is marked"):
        npmi.npmi(made)


def test_differences_of_all_experts_sum_to_nothing(case):
    made = case.profile("sequences")
    map_SLE, of_S = count_difference.maps(made)
    assert np.allclose(map_SLE.sum(2), 2)
    assert np.allclose(count_difference.difference(map_SLE, of_S, 1).sum(1), 0)
    with pytest.raises(InputError, match="no class is named"):
        count_difference.count_difference(made)
    with pytest.raises(InputError, match="two labels are needed"):
        contrast.contrast(made, label="a", against="a")


def test_shuffled_classes_have_no_experts():
    rng = np.random.default_rng(0)
    counts = np.stack([rng.multinomial(50, np.full(16, 1 / 16)) for _ in range(60)])[:, None]
    arrays = {"sequence_counts_SLE": counts, "sequence_tokens_S": np.full(60, 50), "sequence_label_S": np.arange(60) % 2 + 1}
    made = profile(arrays, labels=("a", "b"), tokens_G=(1500, 1500), layers=(layer(16),))
    z = count_difference.count_difference(made, label="a", most=16).column("z")
    assert 0.5 < np.std(z) < 1.6 and max(np.abs(z)) < 4


def test_divergence_of_languages():
    p, q = np.array([4.0, 4, 0, 0]), np.array([0.0, 0, 1, 3])
    assert multilingual.divergence(p, 2 * p) == 0 and multilingual.divergence(p, q) == pytest.approx(1)
    drawn = np.random.default_rng(0).random((2, 6))
    assert (
        multilingual.divergence(*drawn) == pytest.approx(multilingual.divergence(*drawn[::-1]))
        and 0 < multilingual.divergence(*drawn) < 1
    )
    assert multilingual.divergence(p, p, "entropy") == 0 and math.isnan(multilingual.divergence(p, 0 * p))


def test_divergence_of_planted_domains(case):
    made = case.profile("usage")
    found = multilingual.multilingual(made, reference="a")
    assert found.columns == ("layer", "b", "c") and found.column("b") == pytest.approx([1, 1])
    with pytest.raises(InputError, match="no label 'en'"):
        multilingual.multilingual(made)


# Checkpoints, loss, sparsity


def test_routing_of_two_checkpoints(case, tmp_path):
    made = case.profile("counts")
    made.save(tmp_path / "one")
    found = early_routing.early_routing(made, other=str(tmp_path / "one"))
    assert found.column("first") == [1, 1] == found.column("overlap") and max(found.column("first_chance")) < 0.4
    ids = np.array(made.trace.experts_LTK)
    ids[0] = (ids[0] + 1) % 14
    moved = dataclasses.replace(made, trace=dataclasses.replace(made.trace, experts_LTK=ids))
    moved.save(tmp_path / "two")
    found = early_routing.early_routing(made, other=str(tmp_path / "two"))
    assert found.column("first")[0] < 0.2 and found.column("first")[1] == 1
    dataclasses.replace(made, data="other", trace=dataclasses.replace(made.trace, info={"data": "other"})).save(
        tmp_path / "three"
    )
    with pytest.raises(InputError, match="other data"):
        early_routing.early_routing(made, other=str(tmp_path / "three"))


def test_agreement_of_sets():
    a, b = np.array([[0, 1], [2, 3], [1, -1]]), np.array([[0, 2], [2, 3], [3, -1]])
    assert early_routing.agreement(a, b) == pytest.approx((2 / 3, (1 / 3 + 1 + 0) / 3))


def test_a_uniform_byte_model_needs_eight_bits():
    arrays = {"nats_G": np.array([100 * math.log(256)]), "predicted_G": np.array([100])}
    found = bits_per_character.bits_per_character(profile(arrays))
    assert found.rows[0][1:] == pytest.approx((8, math.log(256), 256, 1))
    with pytest.raises(InputError, match="characters of the text are not known"):
        bits_per_character.bits_per_character(profile(arrays, characters_G=None))


def test_bits_of_two_labels():
    arrays = {"nats_G": np.array([10.0, 30.0]), "predicted_G": np.array([9, 19])}
    found = bits_per_character.bits_per_character(profile(arrays, labels=("a", "b"), tokens_G=(10, 20), characters_G=(40, 60)))
    assert found.column("bits_per_character") == pytest.approx([x / math.log(2) for x in (10 / 40, 30 / 60, 40 / 100)])
    assert found.column("predicted") == pytest.approx([0.9, 0.95, 28 / 30])


def test_activation_sparsity_of_a_planted_curve():
    grid = np.array([0.0, 1, 2, 4])
    arrays = {
        "thresholds_Q": grid,
        "tail_LQ": 10 * np.array([[0.0, 0.0, 0.2, 1.0]]),
        "kept_LQ": 1000 * np.array([[1.0, 0.8, 0.4, 0.0]]),
        "tested_L": np.array([10]),
        "neurons_L": np.array([1000]),
    }
    made = profile(arrays, layers=(layer(4, 2),))
    found = activation_sparsity.activation_sparsity(made)
    active = found.column("active")
    assert active[0] == pytest.approx(0.8), "neurons that add nothing are free"
    assert np.diff(active).max() <= 1e-12
    assert found.column("of_all_experts") == pytest.approx([a / 2 for a in active])
    (row,) = activation_sparsity.activation_sparsity(made, kappa=0.6).rows
    assert row[1] == pytest.approx(0.2) and activation_sparsity.thresholds(made, 0.6) == pytest.approx([3.0])
    assert activation_sparsity.thresholds(made, 0.0) == [0.0]


# Calculators


def test_efficiency_leverage_of_the_paper():
    law = efficiency_leverage.leverage
    assert law(0.031, 12, 1e22) == pytest.approx(7.25, abs=0.01)
    assert math.isclose(efficiency_leverage.BEST_G, 11.3, abs_tol=0.05)
    for flops in (1e18, 1e20, 1e22):
        assert law(1.0, 12, flops) == pytest.approx(1, abs=0.015)
        values = [law(a, 8, flops) for a in (0.01, 0.03, 0.1, 0.3, 1)]
        assert values == sorted(values, reverse=True)
        for ratio in (0.02, 0.2):
            grid = np.linspace(4, 30, 1000)
            assert grid[np.argmax([law(ratio, g, flops) for g in grid])] == pytest.approx(11.3, abs=0.1)
    with pytest.raises(InputError, match="ratio 0"):
        law(0, 12, 1e22)


def test_leverage_of_a_profiled_model():
    made = profile(layers=(layer(64, 6, shared=32, d_model=64, d_expert=16),))
    (row,) = efficiency_leverage.efficiency_leverage(made, flops=1e21).rows
    assert row[:2] == pytest.approx((8 / 66, 8.0)) and row[5] >= row[3]
    assert any("LIMIT" in n for n in efficiency_leverage.efficiency_leverage(made, flops=1e15).notes)
    assert not any("LIMIT" in n for n in efficiency_leverage.efficiency_leverage(made, flops=1e21).notes)


SHARES = (0.125, 0.25, 0.375, 0.5)


def general(tokens, share):
    return 0.5 * share * tokens**0.3 - 0.45 * share * tokens**0.6 + 0.02


def curves(path, shares=SHARES):
    at = np.linspace(0.05, 1, 20)
    runs = {
        str(r): {"tokens": at.tolist(), "general": general(at, r).tolist(), "domain": (-0.3 * at**0.4 + 0.02).tolist()}
        for r in shares
    }
    path.write_text(json.dumps(runs))
    return str(path)


def test_curves_of_the_laws_give_them_back(tmp_path):
    at = np.linspace(0.05, 1, 20)
    for change, terms in ((-0.3 * at**0.4 + 0.02, 1), (general(at, 0.3), 2)):
        law, error = critical_mixture_ratio.fit(at, change, terms)
        assert error < 1e-6 and np.allclose(
            law(np.linspace(0.05, 1, 77)), np.interp(np.linspace(0.05, 1, 77), at, change), atol=2e-3
        )


def test_the_critical_ratio_is_that_of_brute_force(tmp_path):
    path = curves(tmp_path / "c.json")
    found = {}
    for tolerance in (0.02, 0.05, 0.08):
        told = critical_mixture_ratio.critical_mixture_ratio(profile(), curves=path, tolerance=tolerance)
        assert max(c for c in told.column("general_error") if c is not None) < 1e-5
        found[tolerance] = told.rows[-1][-1]
        at = np.linspace(0.05, 1, 4000)
        at = at[-0.3 * at**0.4 + 0.02 < 0]
        least = [general(at, r).min() for r in np.linspace(0.125, 0.5, 400)]
        inside = np.linspace(0.125, 0.5, 400)[np.array(least) <= tolerance]
        if found[tolerance] is None:
            assert not len(inside)
        else:
            assert found[tolerance] == pytest.approx(inside.max(), abs=0.02)
    values = [v or 0.0 for v in found.values()]
    assert values == sorted(values) and values[0] < values[-1]
    beyond = critical_mixture_ratio.critical_mixture_ratio(profile(), curves=path, horizon=5.0)
    assert any("extrapolated" in note for note in beyond.notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "there are no curves"), ("{", "holds no curves"), ('{"0.5": {"tokens": [1, 2], "general": [1, 2], "domain": [1, 2]}}', "2. points"),
     ('{"0.5": {"tokens": [1]}}', "holds no curves"), ("{}", "has the shares")],
)  # fmt: skip
def test_bad_curves(tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=message):
        critical_mixture_ratio.read_curves(str(tmp_path / "c.json") if content else "")


# Intervals


def test_wilson_by_closed_values():
    low, high = wilson([0, 5, 10, 0], [10, 10, 10, 0])
    assert low == pytest.approx([0, 0.23659, 0.72247, 0], abs=1e-4) and high == pytest.approx([0.27753, 0.76341, 1, 1], abs=1e-4)


def test_the_bootstrap_covers_a_mean():
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        x = rng.standard_normal(60)
        low, high = bootstrap(lambda t, x=x: (t @ x) / t.sum(), 60, draws=200, seed=seed)
        inside += low <= 0 <= high
    assert 49 <= inside <= 60


def test_drops_by_definition():
    from tests.profile.make import traced

    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((1, 40, 6)) ** [1, 1, 1, 1, 3, 3], axis=2)[:, :, :2]
    made: Profile = traced(ids, 6, lengths=[30, 10])
    for rows in (np.arange(30), np.arange(30, 40)):
        lost, _asked = drop_towards_end.dropped(made.trace, 0, rows, 1.25)
        capacity = math.ceil(1.25 * len(rows) * 2 / 6)
        loads = np.bincount(ids[0, rows].reshape(-1), minlength=6)
        assert lost.sum() == np.maximum(0, loads - capacity).sum()
        flat = ids[0, rows].reshape(-1)
        for place in np.flatnonzero(lost.reshape(-1)):
            assert (flat[:place] == flat[place]).sum() >= capacity
    even = traced(np.stack([np.stack([np.arange(40) % 3, 3 + np.arange(40) % 3], 1)]), 6)
    assert drop_towards_end.drop_towards_end(even).rows[0][1:] == (0, 0, 0, 0, 0)


def test_late_tokens_of_an_uneven_sequence_are_dropped():
    from tests.profile.make import traced

    rows = drop_towards_end.drop_towards_end(traced(np.zeros((1, 40, 1), int), 4)).rows
    assert rows[0][1:] == pytest.approx((0, 0.7, 1, 1, 27 / 40)), "capacity is 13 of 40"
