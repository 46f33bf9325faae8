"""Laws of Routing, on numpy and on torch alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.routing import Routing

LIBRARIES = ("numpy", "torch")


def make(library: str, experts_TK: np.ndarray, weights_TK: np.ndarray) -> Routing:
    if library == "torch":
        return Routing(torch.from_numpy(experts_TK.copy()), torch.from_numpy(weights_TK.copy()))
    return Routing(experts_TK.copy(), weights_TK.copy())


def arrays(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(routing.experts_TK), np.asarray(routing.weights_TK)


@st.composite
def routings(draw) -> tuple[int, np.ndarray, np.ndarray]:
    """(E, experts_TK, weights_TK): unique ids per row, some slots empty with weight 0."""
    tokens, num = draw(st.integers(0, 9)), draw(st.integers(1, 8))
    slots, seed = draw(st.integers(1, num)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(num)[:slots] for _ in range(tokens)], np.int64).reshape(tokens, slots)
    weights = rng.random((tokens, slots)).astype(np.float32) + 0.01
    empty = rng.random((tokens, slots)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return num, np.where(empty, -1, ids), np.where(empty, 0, weights).astype(np.float32)


def spread(num: int, experts_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """weights_TE: what each expert gets of each token, however the slots are arranged."""
    out = np.zeros((len(experts_TK), num), np.float64)
    for t, row in enumerate(experts_TK):
        for k, e in enumerate(row):
            if e >= 0:
                out[t, e] += weights_TK[t, k]
    return out


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=60, deadline=None)
@given(data=routings())
def test_pairs_are_the_full_slots_grouped_by_expert(library, data):
    num, experts, weights = data
    pairs = make(library, experts, weights).pairs(num)
    token, slot, expert, weight, starts = (
        np.asarray(a) for a in (pairs.token_N, pairs.slot_N, pairs.expert_N, pairs.weight_N, pairs.starts_E1)
    )
    wanted = sorted((int(experts[t, k]), t, k) for t, k in np.argwhere(experts >= 0))
    assert list(zip(expert.tolist(), token.tolist(), slot.tolist())) == wanted
    assert (weight == weights[token, slot]).all()
    assert starts.shape == (num + 1,) and starts[0] == 0 and starts[-1] == len(wanted)
    for e in range(num):
        assert (expert[starts[e] : starts[e + 1]] == e).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_pairs_refuse_an_expert_beyond_the_last(library):
    with pytest.raises(AssertionError):
        make(library, np.array([[0, 5]]), np.ones((1, 2), np.float32)).pairs(4)


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=60, deadline=None)
@given(data=routings(), seed=st.integers(0, 1000), renormalise=st.booleans())
def test_drop(library, data, seed, renormalise):
    _, experts, weights = data
    mask = np.random.default_rng(seed).random(experts.shape) < 0.4
    before = make(library, experts, weights)
    out = before.drop(torch.from_numpy(mask) if library == "torch" else mask, renormalise=renormalise)
    ids, new = arrays(out)
    assert (ids[mask] == -1).all() and (new[mask] == 0).all()
    assert (ids[~mask] == experts[~mask]).all()
    assert (arrays(before)[0] == experts).all(), "the original is untouched"
    if not renormalise:
        assert (new[~mask] == weights[~mask]).all()
        return
    for t in range(len(ids)):
        if new[t].any():
            assert new[t].sum() == pytest.approx(weights[t].sum(), rel=1e-5)
            kept = new[t] > 0
            assert new[t][kept] / new[t][kept].sum() == pytest.approx(weights[t][kept] / weights[t][kept].sum(), rel=1e-5)
        else:
            assert not weights[t][~mask[t]].any(), "a row becomes empty only when all of it is dropped"


@pytest.mark.parametrize("library", LIBRARIES)
@settings(max_examples=80, deadline=None)
@given(data=routings(), seed=st.integers(0, 1000))
def test_relabel_moves_every_weight_to_its_new_expert(library, data, seed):
    num, experts, weights = data
    table = np.random.default_rng(seed).integers(-1, 4, num)
    out = make(library, experts, weights).relabel(torch.from_numpy(table) if library == "torch" else table)
    ids, new = arrays(out)
    old = spread(num, experts, weights)
    wanted = np.zeros((len(experts), 4))
    for e in range(num):
        if table[e] >= 0:
            wanted[:, table[e]] += old[:, e]
    assert spread(4, ids, new) == pytest.approx(wanted, rel=1e-5)
    assert (new[ids < 0] == 0).all()
    for row in ids:
        named = row[row >= 0]
        assert len(set(named.tolist())) == len(named), "colliding slots add up into one"
    assert out.logits_TE is None and out.probs_TE is None


@pytest.mark.parametrize("library", LIBRARIES)
def test_relabel_by_a_permutation_and_back_is_the_same(library):
    experts, weights = np.array([[2, 0, -1], [1, 3, 0]]), np.array([[0.5, 0.25, 0], [0.2, 0.3, 0.5]], np.float32)
    there, back = np.array([3, 0, 1, 2]), np.array([1, 2, 3, 0])
    if library == "torch":
        there, back = torch.from_numpy(there), torch.from_numpy(back)
    ids, new = arrays(make(library, experts, weights).relabel(there).relabel(back))
    assert (ids == experts).all() and new == pytest.approx(weights)
