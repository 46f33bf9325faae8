"""Laws of every method that puts a weight matrix into few bits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import MoestroError
from moestro.core.method import load
from moestro.kernels.packed import Packed
from tests.laws.cards import cards

CARDS = cards("moestro.compress.encode", "encode")
RNG = np.random.default_rng(3)
INPUTS_nC = RNG.standard_normal((400, 128)).astype(np.float32) @ RNG.standard_normal((128, 128)).astype(np.float32)
INPUTS = Inputs.of(INPUTS_nC)
WEIGHTS_RC = (RNG.standard_normal((48, 128)) * 0.05).astype(np.float32)


CODECS = ("int8:64", "int4:32", "uint4:64", "int3:64", "int2:128", "nested:64/2", "nested:32/3", "nested:64", "mxfp4")


def cases():
    """Every method with every codec that it makes; what it does not make it refuses."""
    for card in CARDS:
        fn, made = load(card.name, "encode"), 0
        assert card.options[0].name == "codec", "an encoder's codec is an option"
        for codec in CODECS:
            try:
                fn(WEIGHTS_RC[:16], INPUTS, codec=codec)
            except MoestroError:
                continue
            made += 1
            yield pytest.param(partial(fn, codec=codec), id=f"{card.name.rsplit('.', 1)[-1]}-{codec}")
        assert made, f"{card.name} makes no codec"


@pytest.mark.parametrize("encode", list(cases()))
class TestEncode:
    def test_is_nearer_to_the_weights_than_nothing(self, encode):
        made = encode(WEIGHTS_RC, INPUTS)
        assert isinstance(made, Packed) and made.shape == WEIGHTS_RC.shape
        away_nR = INPUTS_nC @ (made.dequantise() - WEIGHTS_RC).T
        assert np.square(away_nR).sum() < 0.5 * np.square(INPUTS_nC @ WEIGHTS_RC.T).sum()

    def test_rows_do_not_depend_on_their_company(self, encode):
        order = np.random.default_rng(0).permutation(48)
        np.testing.assert_allclose(
            encode(WEIGHTS_RC[order], INPUTS).dequantise(), encode(WEIGHTS_RC, INPUTS).dequantise()[order], atol=1e-6
        )

    def test_says_the_same_twice(self, encode):
        for a, b in zip(encode(WEIGHTS_RC, INPUTS).parts, encode(WEIGHTS_RC, INPUTS).parts, strict=True):
            assert np.array_equal(a, b)

    def test_leaves_what_it_is_given_alone(self, encode):
        before = WEIGHTS_RC.copy()
        encode(WEIGHTS_RC, INPUTS)
        assert np.array_equal(before, WEIGHTS_RC)

    def test_zeros_stay_zeros(self, encode):
        assert not encode(np.zeros((16, 128), np.float32), INPUTS).dequantise().any()

    def test_the_weights_unit_does_not_matter(self, encode):
        one, other = encode(WEIGHTS_RC, INPUTS).dequantise(), encode(WEIGHTS_RC * np.float32(4), INPUTS).dequantise()
        np.testing.assert_allclose(4 * one, other, atol=2e-3)

    def test_columns_that_are_never_used_do_no_harm(self, encode):
        moment_CC = INPUTS.moment_CC.copy()
        moment_CC[5] = moment_CC[:, 5] = 0
        assert np.isfinite(encode(WEIGHTS_RC, Inputs(moment_CC, 400)).dequantise()).all()
