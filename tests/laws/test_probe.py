"""Laws of every probe: what it gives does not depend on shards, their order, or stopping and going on; and it keeps its word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moestro.core.errors import ProfileError
from moestro.core.method import card_of
from moestro.profile.data import cut
from moestro.profile.probe import make
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.tiny import save_tiny
from tests.laws.cards import cards

CARDS = cards("moestro.profile.probes", "probe")
NAMES = [card.name for card in CARDS]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    from moestro.models.open import open_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("law") / "model"
    save_tiny("olmoe", folder)
    rng = np.random.default_rng(0)
    documents = [Document("ab"[i % 2], "drawn", tokens=rng.integers(4, 100, 30).tolist()) for i in range(5)]
    model = open_model(folder)
    model.show_attention()
    return model, cut(documents, None, length=16, stride=12)


def recorded(running, name, *runs) -> Recording:
    """One recording that reads the sequences in these runs."""
    model, texts = running
    recording = Recording(model, texts, make({name: {}}))
    for sequences in runs or (None,):
        recording.run(model, sequences)
    return recording


def assert_equal(first: Recording, second: Recording) -> None:
    one, other = first.profile(), second.profile()
    assert set(one.arrays) == set(other.arrays)
    for key, array in one.arrays.items():
        assert array.dtype == other.arrays[key].dtype and np.array_equal(array, other.arrays[key]), key
    assert one.tokens_G == other.tokens_G
    assert (one.trace is None) == (other.trace is None)
    if one.trace is not None and other.trace is not None:
        assert np.array_equal(one.trace.experts_LTK, other.trace.experts_LTK)
        assert np.array_equal(one.trace.tokens_T, other.trace.tokens_T)


def test_the_catalogue_is_walked():
    assert {"profile.probes.counts", "profile.probes.moments"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_sequences_changes_no_bit(running, name):
    assert_equal(recorded(running, name), recorded(running, name, [14, 3, 7], [0, 1, 2, 4], [13, 12, 11, 10, 9, 8, 6, 5]))


@pytest.mark.parametrize("name", NAMES)
def test_shards_merge_in_any_order(running, name):
    shards = [[0, 3, 4, 9], [1, 2, 14, 13], [5, 6, 7, 8, 10, 11, 12]]
    for order in ((0, 1, 2), (2, 0, 1)):
        parts = [recorded(running, name, shards[i]) for i in order]
        for other in parts[1:]:
            parts[0].merge(other)
        assert_equal(recorded(running, name), parts[0])


@pytest.mark.parametrize("name", NAMES)
def test_going_on_gives_what_an_uninterrupted_run_gives(running, name, tmp_path):
    model, texts = running
    first = recorded(running, name, range(6))
    first.save(tmp_path / "partial")
    second = Recording(model, texts, make({name: {}}))
    second.restore(tmp_path / "partial")
    assert second.done_S.sum() == 6
    second.run(model)
    assert_equal(recorded(running, name), second)


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_gives_what_it_says_and_it_is_finite(running, name):
    recording = recorded(running, name)
    made = recording.profile()
    probe = recording.probes[name]
    assert set(made.arrays) == set(probe.gives)
    assert all(np.isfinite(a).all() for a in made.arrays.values())
    assert any(np.any(a) for a in made.arrays.values()), "something was seen"
    assert recording.nbytes < 2_000_000


def test_names_of_statistics_are_unique():
    probes = make({name: {} for name in NAMES})
    given = [statistic for probe in probes.values() for statistic in probe.gives]
    assert len(given) == len(set(given))


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_of_the_known_kinds(name):
    probe = make({name: {}})[name]
    assert set(card_of(probe).needs) <= {"logits", "inputs", "residual", "experts", "attention"}


def test_recordings_of_other_runs_do_not_mix(running, tmp_path: Path):
    counts, gates = recorded(running, "counts", [0]), recorded(running, "gates", [1])
    with pytest.raises(ProfileError, match="different runs"):
        counts.merge(gates)
    with pytest.raises(ProfileError, match="is in both"):
        counts.merge(recorded(running, "counts", [0, 1]))
    gates.save(tmp_path / "partial")
    with pytest.raises(ProfileError, match="other probes"):
        counts.restore(tmp_path / "partial")
