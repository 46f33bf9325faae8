"""Which sequence comes when: every sequence once per lap, held-out ones never, all from seed and step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.core.errors import InputError
from moestro.train.data.stream import Stream, drawn, shuffled
from moestro.train.data.tokens import Tokens, prepare


def stream(tokens: Tokens, **options) -> Stream:
    return Stream(tokens, **{"length": 16, "holdout": 0.1, "weights": {}, "seed": 0, **options})


def test_targets_are_the_next_tokens_of_the_text(tokens):
    made = stream(tokens)
    batch = made.batch(0, 8)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (8, 16)
    assert torch.equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    for row, domain in zip(batch.targets_BT.numpy(), batch.domain_B.tolist(), strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(tokens.ids[domain], 16)
        assert (windows == row).all(1).any()


def test_each_lap_has_every_training_sequence_once_and_no_held_out_one(tokens):
    made = stream(tokens)
    lap = sum(map(len, made.training))
    for start in (0, lap):
        seen = Counter(made.place(start + i) for i in range(lap))
        assert set(seen.values()) == {1}
        assert set(seen) == {(d, int(i)) for d, places in enumerate(made.training) for i in places}
    assert [made.place(i) for i in range(lap)] != [made.place(lap + i) for i in range(lap)]
    held = {place for rows in made.held_out_places(10**6) for place in rows}
    assert not held & set(seen) and [len(out) for out in made.held_out] == [18, 12, 6]
    assert len(held | set(seen)) == sum((d.tokens - 1) // 16 for d in tokens.domains)
    assert [row[1] for row in made.held_out_places(10**6)[2]][:3] == [5, 15, 25]  # spread over the domain
    assert [len(rows) for rows in made.held_out_places(2)] == [2, 2, 2] and {
        place for rows in made.held_out_places(2) for place in rows
    } < held
    assert stream(tokens, seed=9).held_out_places(4) == made.held_out_places(4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63), first=st.integers(0, 10**12), group=st.sampled_from([1, 2, 4]))
def test_a_place_depends_on_seed_and_number_only(tokens, seed, first, group):
    one, other = stream(tokens, seed=seed, group=group), stream(tokens, seed=seed, group=group)
    other.batch(first // 2, 3)  # what was read before does not matter
    assert [one.place(first + i) for i in range(6)] == [other.place(first + i) for i in range(6)]


def test_seeds_differ(tokens):
    assert [stream(tokens).place(i) for i in range(20)] != [stream(tokens, seed=1).place(i) for i in range(20)]


def test_weights_set_the_shares_and_every_sequence_still_comes(tokens):
    made = stream(tokens, weights={"digits": 3, "letters": 1})
    lap = sum(map(len, made.training))
    seen = [made.place(i) for i in range(6 * lap)]
    share = Counter(domain for domain, _ in seen)
    assert set(share) == {1, 2} and share[2] / share[1] == pytest.approx(3, rel=0.03)
    used = Counter(place for place in seen if place[0] == 2)
    assert len(used) == len(made.training[2]) and max(used.values()) - min(used.values()) <= 1


def test_groups_are_of_one_domain(tokens):
    made = stream(tokens, group=4)
    batches = [made.batch(4 * i, 4) for i in range(12)]
    assert all(len(set(b.domain_B.tolist())) == 1 for b in batches)
    assert len({int(b.domain_B[0]) for b in batches}) == 3


def test_permutations_do_not_move_with_the_library():
    """Fixed values: another numpy must give the same order, or a resumed run would read other text."""
    assert shuffled(8, 1, 2, 3).tolist() == [2, 7, 6, 3, 0, 4, 5, 1]
    assert sorted(shuffled(1000, 5).tolist()) == list(range(1000))
    assert len({drawn(0, i) for i in range(1000)} | {drawn(1, i) for i in range(1000)}) == 2000
    assert all(0 <= drawn(2**64 - 1, i, 2**40) < 2**63 for i in range(100))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 5000}, r"the text 'count' has \d+ tokens[\s\S]*10001 or more: 1 training sequence of 5000 and one held out"),
        ({"length": 2500, "holdout": 0}, "the text 'letters'"),
        ({"group": 200, "holdout": 0}, "200 training sequences of 16"),
        ({"weights": {"prose": 1}}, "data.weights names prose"),
        ({"weights": {"digits": -1}}, "no weight below 0"),
        ({"weights": {"digits": 0}}, "one above 0"),
    ],
)
def test_text_that_is_too_short_and_weights_that_cannot_be(tokens, options, said):
    with pytest.raises(InputError, match=said):
        stream(tokens, **options)


def test_a_text_of_exactly_one_sequence(tmp_path):
    made = stream(prepare([("a", "x" * 16)], "bytes", tmp_path / "t"), holdout=0)
    assert [len(p) for p in made.training] == [1] and [made.place(i) for i in range(3)] == [(0, 0)] * 3
    with pytest.raises(InputError, match="17 tokens"):
        stream(prepare([("a", "x" * 16)], "bytes", tmp_path / "t"))


def test_documents_are_told_apart_where_asked(tmp_path):
    tokens = prepare([("a", "one"), ("a", "tw"), ("a", "three")] * 6, "bytes", tmp_path / "tokens")
    made = stream(tokens, length=6, documents=True)
    assert stream(tokens, length=6).batch(0, 2).document_BT is None
    batch = made.batch(0, 9)
    places = batch.positions()
    for row, document, place in zip(batch.tokens_BT.tolist(), batch.document_BT.tolist(), places.tolist(), strict=True):
        number, at = 0, 0
        for token, d, p in zip(row, document, place, strict=True):
            assert (d, p) == (number, at), "an end token is of the document that it ends"
            number, at = (number + 1, 0) if token == tokens.end else (number, at + 1)
    assert int(batch.document_BT.max()) >= 1
