"""Perplexity and divergence against closed forms, for runners that say what they are told to."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from moestro.core.errors import InputError
from moestro.core.layer import RunnerOutput
from moestro.evaluate.perplexity import cut, error_of, log_softmax, measure


class Says:
    """A runner whose logits after token t are table[t]."""

    facts = SimpleNamespace()

    def __init__(self, table_VV):
        self.table_VV = np.asarray(table_VV, np.float32)

    def run(self, tokens_BT, *, inputs=False):
        for tokens in tokens_BT:
            yield RunnerOutput(self.table_VV[tokens], ())


TABLE = np.random.default_rng(0).standard_normal((7, 7)) * 3
TEXT = [[int(t) for t in row] for row in np.random.default_rng(1).integers(0, 7, (3, 80))]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary():
    found = measure(Says(np.zeros((7, 7))), TEXT)
    assert found.perplexity == pytest.approx(7) and found.tokens == 3 * 79 and found.kl is None


def test_a_model_that_knows_the_text_is_not():
    walk = [[i % 7 for i in range(50)]]
    assert measure(Says(40 * np.eye(7)[(np.arange(7) + 1) % 7]), walk).perplexity == pytest.approx(1)


def test_likelihood_and_divergence_are_the_sums_they_are_defined_by():
    other = np.random.default_rng(2).standard_normal((7, 7))
    found = measure(Says(other), TEXT, Says(TABLE))
    nll, kl, n = 0.0, 0.0, 0
    for row in TEXT:
        for now, following in itertools.pairwise(row):
            p, q = (np.exp(t[now]) / np.exp(t[now]).sum() for t in (np.float32(TABLE), np.float32(other)))
            nll -= math.log(q[following])
            kl += float((p * np.log(p / q)).sum())
            n += 1
    assert found.nll == pytest.approx(nll / n) and found.kl == pytest.approx(kl / n) and found.tokens == n
    assert measure(Says(TABLE), TEXT, Says(TABLE)).kl == 0


def test_the_error_of_a_mean_is_how_means_scatter():
    draws = np.random.default_rng(3).gamma(2.0, size=(400, 250))
    assert np.mean([error_of(row) for row in draws]) == pytest.approx(draws.mean(1).std(), rel=0.1)


def test_what_cannot_be_measured():
    with pytest.raises(InputError, match="no token"):
        measure(Says(TABLE), [[3], [4]])
    broken = TABLE.copy()
    broken[2, 2] = np.nan
    with pytest.raises(InputError, match="not numbers"):
        measure(Says(broken), TEXT)


def test_large_logits_do_not_overflow():
    found = log_softmax(np.array([[1e30, 0.0], [-1e30, -1e30]], np.float32))
    assert found[0, 0] == 0 and found[1, 0] == pytest.approx(-math.log(2))


def test_text_is_cut_into_equal_sequences():
    assert cut(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(range(7), 4, start=[9]) == [[9, 0, 1, 2], [9, 3, 4, 5]]
    assert cut(range(3), 4) == []
