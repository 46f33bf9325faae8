"""Weights in few bits: closed forms, and each method against its ablation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from moestro.compress.encode.d2moe import d2moe
from moestro.compress.encode.gptq import gptq, rounded
from moestro.compress.encode.grids import Grid, Range, by_groups, grid_of
from moestro.compress.encode.hqq import hqq
from moestro.compress.encode.inputs import ExpertInputs, Inputs, factor, hidden
from moestro.compress.encode.rtn import rtn
from moestro.compress.encode.ternary import ternary
from moestro.compress.encoding import encoded
from moestro.core.errors import CheckpointError, InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.models.codecs.encode import parse_codec

EVEN = ("int8:64", "int4:64", "uint4:64", "int3:64", "int2:64", "nested:64/2", "nested:64/3", "nested:64/4")


@pytest.fixture(scope="module")
def w_RC():
    return (np.random.default_rng(0).standard_normal((64, 128)) * 0.03).astype(np.float32)


@pytest.fixture(scope="module")
def x_nC():
    rng = np.random.default_rng(1)
    return (rng.standard_normal((600, 128)) @ (rng.standard_normal((128, 128)) * 0.9 ** np.arange(128)[:, None])).astype(
        np.float32
    )


def output_error(made, w_RC, x_nC):
    return float(np.square(x_nC @ (made.dequantise() - w_RC).T).sum())


@pytest.mark.parametrize("codec", EVEN)
def test_tiles_hold_the_levels_that_were_chosen(codec, w_RC):
    grid = grid_of(codec)
    w_NG = by_groups(w_RC, 64)
    range_ = grid.fit(w_NG)
    u_NG = grid.codes(w_NG, range_)
    made = grid.lay(u_NG.reshape(w_RC.shape), range_)
    np.testing.assert_allclose(made.dequantise(), grid.values(u_NG, range_).reshape(w_RC.shape), rtol=1e-5, atol=1e-7)
    assert made.format == parse_codec(codec).format and 2**made.planes - grid.levels in (0, 1)  # int8 leaves -128 out


@pytest.mark.parametrize("codec", EVEN)
def test_each_weight_goes_to_the_level_next_to_it(codec, w_RC):
    grid = grid_of(codec)
    w_NG = by_groups(w_RC, 64)
    range_ = grid.fit(w_NG)
    levels_NU = np.stack([grid.values(np.full((len(w_NG), 1), u), range_)[:, 0] for u in range(grid.levels)], 1)
    least = np.abs(w_NG[:, :, None] - levels_NU[:, None]).min(-1)
    np.testing.assert_allclose(np.abs(w_NG - grid.values(grid.codes(w_NG, range_), range_)), least, atol=1e-7)


def test_searching_for_the_range_helps_where_one_weight_is_large(w_RC):
    planted = w_RC.copy()
    planted[:, ::64] *= 8
    plain, searched = (rtn(planted, codec="int4:64", search=s).dequantise() for s in (False, True))
    assert np.square(searched - planted).sum() < np.square(plain - planted).sum()


def test_rounding_is_within_half_a_level(w_RC):
    made = rtn(w_RC, codec="int8:64").dequantise()
    half = np.abs(by_groups(w_RC, 64)).max(-1) / 127 / 2
    assert (np.abs(by_groups(made - w_RC, 64)).max(-1) <= half * 1.01).all()


def test_ternary_is_the_best_of_all_choices():
    w_RC = np.random.default_rng(5).standard_normal((8, 32)).astype(np.float32)
    made = ternary(w_RC, codec="nested:32/2").dequantise()
    for row, found in zip(w_RC, made, strict=True):
        assert len(np.unique(np.abs(found[found != 0]))) == 1
        order = np.argsort(-np.abs(row))
        errors = []
        for k in range(1, 33):  # of k kept weights the k largest are the best
            want = np.zeros(32)
            want[order[:k]] = np.sign(row[order[:k]]) * np.abs(row[order[:k]]).mean()
            errors.append(np.square(want - row).sum())
        assert np.square(found - row).sum() == pytest.approx(min(errors), rel=1e-2)


def test_gptq_with_independent_inputs_rounds_to_nearest(w_RC):
    alone = Inputs(np.diag(np.full(128, 3.0)), 100)
    for codec in ("int4:64", "nested:64/3"):
        for ordered in (False, True):
            made = gptq(w_RC, alone, codec=codec, ordered=ordered)
            assert np.array_equal(made.dequantise(), rtn(w_RC, codec=codec, search=True).dequantise())


def test_gptq_of_two_columns_is_the_closed_form():
    """The second weight moves to where the damped output error is least, given the first one's rounding."""

    class Coarse(Grid):
        def fit(self, w_NG, weight_NG=None):
            return Range(np.ones(len(w_NG), np.float32), np.zeros(len(w_NG), np.float32))

    grid = Coarse(parse_codec("int4:32")._replace(group=2), 16, 1.0, -8.0, "signed")
    moment = np.array([[2.0, 1.5], [1.5, 3.0]])
    w = np.array([[0.4, 1.2]], np.float32)
    damped = moment + 0.01 * 2.5 * np.eye(2)
    codes, _ = rounded(w, factor(moment, 0.01), grid)
    error = 0.4 - 0.0
    assert codes[0, 0] - 8 == 0
    assert codes[0, 1] - 8 == np.rint(1.2 + error * damped[0, 1] / damped[1, 1])
    inputs = Inputs(moment, 100)
    codes, _ = rounded(w, inputs.factor(0.01, ordered=True), grid, order_C=inputs.order, size_C=np.diag(moment))
    assert codes[0, 1] - 8 == 1  # the larger input's weight comes first
    assert codes[0, 0] - 8 == np.rint(0.4 + 0.2 * damped[0, 1] / damped[0, 0])


def test_the_largest_inputs_first_is_better_where_inputs_differ(w_RC, x_nC):
    size_C = 10.0 ** np.random.default_rng(3).uniform(-1, 1, 128)
    inputs, x_nC = Inputs.of(x_nC * size_C), x_nC * size_C
    for codec in ("uint4:64", "int4:64", "int3:64"):
        errors = [output_error(gptq(w_RC, inputs, codec=codec, ordered=ordered), w_RC, x_nC) for ordered in (True, False)]
        assert errors[0] < 0.9 * errors[1]


def test_the_factor_is_of_the_inverse(x_nC):
    moment = Inputs.of(x_nC).moment_CC
    upper = factor(moment, 0.01).astype(np.float64)
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(128)
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(128), atol=2e-3)


@pytest.mark.parametrize("codec", EVEN)
def test_gptq_beats_rounding_to_nearest_on_the_output(codec, w_RC, x_nC):
    assert output_error(gptq(w_RC, Inputs.of(x_nC), codec=codec), w_RC, x_nC) < 0.7 * output_error(
        rtn(w_RC, codec=codec, search=True), w_RC, x_nC
    )


def test_gptq_says_what_it_lacks(w_RC):
    with pytest.raises(InputError, match="multiplied"):
        gptq(w_RC, None)
    with pytest.raises(InputError, match="damping"):
        gptq(w_RC, Inputs(np.eye(128), 1), damp=0)
    with pytest.raises(InputError, match="finite"):
        gptq(w_RC, Inputs(np.full((128, 128), np.nan), 1))
    with pytest.raises(CheckpointError, match="even levels"):
        gptq(w_RC, Inputs(np.eye(128), 1), codec="mxfp4")


def test_weights_beyond_float16_are_refused():
    with pytest.raises(CheckpointError, match="too large"):
        gptq(np.full((16, 64), 1e7, np.float32), Inputs(np.eye(64), 1))


@pytest.mark.parametrize("codec", ("uint4:64", "nested:64/2", "nested:64/3", "nested:64/4"))
def test_half_quadratic_lowers_the_mean_error_of_heavy_tails(codec):
    w_RC = (np.random.default_rng(2).standard_t(2.5, (64, 128)) * 0.02).astype(np.float32)
    grid = grid_of(codec)
    w_NG = by_groups(w_RC, 64)
    began = np.abs(w_NG - grid.values(grid.codes(w_NG, grid.fit(w_NG)), grid.fit(w_NG))).mean()
    assert np.abs(hqq(w_RC, codec=codec).dequantise() - w_RC).mean() < began


def test_half_quadratic_needs_an_offset(w_RC):
    with pytest.raises(InputError, match="no offset"):
        hqq(w_RC, codec="int4:64")


def test_planes_of_d2moe_leave_less_and_less(w_RC, x_nC):
    made = d2moe(w_RC, Inputs.of(x_nC))
    errors = [output_error(replace(made, parts=made.parts[:n]), w_RC, x_nC) for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]


def test_d2moe_is_best_at_the_width_that_was_asked_for(w_RC, x_nC):
    made = {planes: d2moe(w_RC, Inputs.of(x_nC), planes=planes) for planes in (2, 4)}
    two, four = ({p: output_error(replace(m, parts=m.parts[:n]), w_RC, x_nC) for p, m in made.items()} for n in (1, 3))
    assert two[2] < 0.8 * two[4] and four[4] < 0.6 * four[2]


@pytest.mark.parametrize("planes", (2, 3, 4))
def test_compensation_helps_at_the_width_that_was_asked_for(planes, w_RC, x_nC):
    made, plain = d2moe(w_RC, Inputs.of(x_nC), planes=planes), rtn(w_RC, codec="nested:64")
    errors = [output_error(replace(one, parts=one.parts[: planes - 1]), w_RC, x_nC) for one in (made, plain)]
    assert errors[0] < 0.9 * errors[1]


def test_a_rare_experts_inputs_are_drawn_towards_the_layers():
    rng = np.random.default_rng(4)
    spec = ExpertSpec(32, 64)
    weights = ExpertWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in ((64, 32), (64, 32), (32, 64))))
    x_TD = rng.standard_normal((500, 32)).astype(np.float32)
    layer_DD = Inputs.of(x_TD).moment_CC
    none = ExpertInputs(x_TD, np.arange(0), spec, layer_DD)
    assert none.first().tokens == 0 and none.first().borrowed == 1
    np.testing.assert_allclose(none.first().moment_CC, layer_DD)
    assert none.last(weights).moment_CC.shape == (64, 64) and np.isfinite(none.last(weights).moment_CC).all()
    few, many = (ExpertInputs(x_TD, np.arange(n), spec, layer_DD, 50) for n in (10, 450))
    assert few.first().borrowed == pytest.approx(50 / 60) and many.last(weights).borrowed == pytest.approx(0.1)
    found = np.linalg.eigvalsh(few.last(weights).moment_CC)
    assert found.min() > -1e-6 * found.max()


def expert_and_inputs(seed):
    rng = np.random.default_rng(seed)
    mix_DD = rng.standard_normal((64, 64)) * 0.9 ** np.arange(64)[:, None]
    x_TD = (rng.standard_normal((1200, 64)) @ mix_DD).astype(np.float32)
    gate_FD, up_FD, down_DF = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((64, 64), (64, 64), (64, 64)))
    return ExpertWeights(gate_FD, up_FD, down_DF), x_TD[:600], x_TD[600:]


def away(made, weights, x_TD):
    """Squared error of the output of an expert whose matrices are tiles."""
    spec, new = ExpertSpec(64, 64), ExpertWeights(*(tiles.dequantise() for tiles in made.values()))
    old_TD, new_TD = (hidden(x_TD, w, spec) @ w.down_DF.T for w in (weights, new))
    return float(np.square(new_TD - old_TD).sum())


@pytest.mark.parametrize("encode", (partial(gptq, codec="int2:64"), partial(gptq, codec="int4:64", ordered=True), d2moe))
@pytest.mark.parametrize("tokens", (600, 20))
def test_the_last_matrix_makes_good_what_the_others_lost(tokens, encode):
    """On text that it was not fitted to; and with few tokens, which could tell it anything, it does no harm."""
    ratios = []
    for seed in range(4):
        weights, seen_TD, other_TD = expert_and_inputs(seed)
        given = ExpertInputs(seen_TD, np.arange(tokens), ExpertSpec(64, 64), Inputs.of(seen_TD).moment_CC)
        errors = [away(encoded(weights, given, encode, chained), weights, other_TD) for chained in (True, False)]
        ratios.append(errors[0] / errors[1])
    assert np.mean(ratios) < (0.96 if tokens == 600 else 1)


def test_a_hidden_unit_that_is_lost_is_read_off_its_likes():
    """Each unit has a copy, and one of the two vanishes: the last matrix doubles what is left, where moments alone change nothing."""
    rng = np.random.default_rng(4)
    gate_FD, up_FD = (np.repeat(rng.standard_normal((32, 64)).astype(np.float32) * 0.1, 2, axis=0) for _ in range(2))
    weights = ExpertWeights(gate_FD, up_FD, rng.standard_normal((64, 64)).astype(np.float32) * 0.1)
    x_TD = rng.standard_normal((40_000, 64)).astype(np.float32)
    spec, lost_FD = ExpertSpec(64, 64), up_FD.copy()
    lost_FD[::2] = 0
    given = ExpertInputs(x_TD, np.arange(40_000), spec, Inputs.of(x_TD).moment_CC, 0)
    inputs, down_DF = given.chained(weights, replace(weights, up_FD=lost_FD))
    np.testing.assert_allclose(inputs.moment_CC, given.last(replace(weights, up_FD=lost_FD)).moment_CC, rtol=1e-6)
    want_DF = weights.down_DF[:, ::2] + weights.down_DF[:, 1::2]
    np.testing.assert_allclose(down_DF[:, 1::2], want_DF, atol=0.02)
    assert np.array_equal(down_DF[:, ::2], weights.down_DF[:, ::2]), "what no input reaches stays"
    weights.down_DF[3, 5] = np.nan
    with pytest.raises(CheckpointError, match="too large"):
        encoded(weights, given, gptq, True)


def test_where_nothing_is_lost_both_ways_give_the_same_bytes():
    """Gate and up lie on the grid already, every group from its least to its largest level."""
    weights, seen_TD, _ = expert_and_inputs(8)
    rng, grid = np.random.default_rng(9), grid_of("int4:64")
    codes_RC = rng.integers(0, 16, (128, 64))
    codes_RC[:, 0] = 0
    on_RC = grid.lay(codes_RC, Range(*(np.full(128, v, np.float32) for v in (0.125, 0)))).dequantise()
    given = ExpertInputs(seen_TD, np.arange(600), ExpertSpec(64, 64), Inputs.of(seen_TD).moment_CC)
    for exact in (True, False):
        start = replace(weights, gate_FD=on_RC[:64], up_FD=on_RC[64:]) if exact else weights
        chained, apart = (encoded(start, given, partial(gptq, codec="int4:64"), way)["down"] for way in (True, False))
        assert np.array_equal(chained.parts[0], apart.parts[0]) == exact


def test_more_tokens_of_ones_own_make_the_fit_better(w_RC):
    """GPTQ with an expert's own inputs beats GPTQ with the layer's, on the expert's inputs."""
    rng = np.random.default_rng(6)
    mine = (rng.standard_normal((900, 128)) * np.where(np.arange(128) < 64, 3, 0.2)).astype(np.float32) @ rng.standard_normal(
        (128, 128)
    ).astype(np.float32)
    others = rng.standard_normal((900, 128)).astype(np.float32)
    errors = [output_error(gptq(w_RC, Inputs.of(x), codec="int3:64"), w_RC, mine) for x in (mine, others)]
    assert errors[0] < 0.6 * errors[1]


def test_all_levels_of_a_nested_grid_are_even():
    for planes in (2, 3, 4):
        grid = grid_of(f"nested:32/{planes}")
        range_ = grid.fit(np.linspace(-1, 1, 32, dtype=np.float32)[None])
        u_RC = np.resize(np.arange(grid.levels), (16, 32))
        made = grid.lay(u_RC, Range(*(np.repeat(part, 16) for part in range_))).dequantise()
        steps = np.diff(np.unique(made[0]).astype(np.float32))
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
