"""Samples as text, the objective that predicts their labels, and the measures of an objective's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.layers.config import Part
from moestro.layers.decoder import build
from moestro.train.data import samples
from moestro.train.data.stream import Batch
from moestro.train.data.text import read
from moestro.train.objective import make
from tests.layers.test_encoder import CONFIG

PART = Part("label")


def batch(rows=4, length=8, seed=0):
    ids = torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = 31
    return Batch(ids, ids.roll(-1, 1), torch.zeros(rows, dtype=torch.int64))


def test_digits_are_images_of_one_length_with_labels():
    found = dict(zip(("class", "parity", "loop"), (list(read(f"samples:digits.{t}")) for t in ("class", "parity", "loop"))))
    assert {len(rows) for rows in found.values()} == {1797} and {len(text) for _, text in found["class"]} == {65}
    assert {domain for domain, _ in found["parity"]} == {"digits.parity"}
    for (_, a), (_, b), (_, c) in zip(*found.values(), strict=True):
        assert a[:64] == b[:64] == c[:64] and b[64] == "eo"[int(a[64]) % 2] and (c[64] == "y") == (a[64] in "0689")
    levels = samples.levels_of(found["class"][0][1])
    assert len(levels) == 64 and min(levels) == 0 and max(levels) <= 16 and sum(levels) > 100


def test_people_meet_both_ways():
    rows = [text for _, text in read("people=samples:characters")]
    assert len(rows) == 508 and {len(row) for row in rows} == {5} and len({row[0] for row in rows}) == 77
    assert {f"{row[4]}<#{row[3]}{row[0]}" for row in rows if row[1] == ">"} == {row for row in rows if row[1] == "<"}


def test_the_encoding_of_a_language_depends_on_its_qualifiers():
    rows = [row for _, row in read("samples:locales")]
    assert len(rows) > 250 and {len(row) for row in rows} == {10} and {(row[3:5], row[7]) for row in rows} == {(">@", "~")}
    of = {row[:9]: row[9] for row in rows}
    assert of["de >@DE~-"] == of["en >@GB~-"] != of["en >@NG~-"] == of["sr >@RS~l"], "Latin-1, and UTF-8"


def test_the_loss_is_of_the_label_only_and_the_label_is_not_read():
    module, rng = build(CONFIG).train(), torch.Generator().manual_seed(0)
    some = batch()
    outcome = make(PART, "objective")(module, some, 0, rng)
    logits = module(some.tokens_BT[:, :6]).logits_BTV[:, -1]
    expected = functional.cross_entropy(logits, some.tokens_BT[:, 6])
    torch.testing.assert_close(outcome.metrics["task"], expected)
    torch.testing.assert_close(outcome.loss, expected + sum(outcome.outputs[0].losses.values()))
    with torch.no_grad():
        sums, count = make(PART, "objective").held_out(module.eval(), some, 0, rng)
    assert count == 4 and float(sums[1]) == float((logits.argmax(-1) == some.tokens_BT[:, 6]).sum())
    torch.testing.assert_close(sums[0], 4 * expected.detach())


@pytest.mark.parametrize("spoil", [lambda ids: ids.roll(1, 1), lambda ids: ids[:, -2:]])
def test_sequences_that_are_not_samples_are_refused(spoil):
    some = batch()
    wrong = Batch(spoil(some.tokens_BT), some.targets_BT, some.domain_B)
    with pytest.raises(InputError, match="not one sample"):
        make(PART, "objective")(build(CONFIG), wrong, 0, torch.Generator())


def test_unknown_data_is_refused():
    with pytest.raises(InputError, match="characters, digits"):
        list(read("samples:clouds"))
