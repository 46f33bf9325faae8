"""Prefixes and holes: what is given and what is asked."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.train.log import read
from moestro.train.objectives import mixed_denoising as mixed
from moestro.train.objectives.mixed_denoising import TASKS, MixedDenoising, sizes, split
from moestro.train.objectives.next_token import NextToken

FIRST, MARKS, SIZE = 50, 40, 65


def rows(count, task=None, monkeypatch=None):
    """Rows made of a text of ids below FIRST, of one task if it is named."""
    if task is not None:
        monkeypatch.setattr(mixed, "SHARES", tuple(float(i == task) for i in range(len(TASKS))))
    rng, text = torch.Generator().manual_seed(0), torch.arange(SIZE) % FIRST
    return text, [MixedDenoising(marks=MARKS).row(text, FIRST, rng) for _ in range(count)]


@pytest.mark.parametrize("task", range(1, len(TASKS)))
def test_the_text_comes_back_from_what_is_given_and_asked(task, monkeypatch):
    text, made = rows(20, task, monkeypatch)
    share, mean = TASKS[task]
    used, masked, count = sizes(SIZE, share, mean)
    lengths = []
    for row, asked in made:
        assert row.shape == asked.shape == (SIZE,)
        known = int(asked.nonzero()[0])
        given, answer = row[:known].tolist(), row[asked].tolist()
        assert torch.equal(asked.nonzero().flatten(), torch.arange(known, known + masked + count))
        spans = {}
        for token in answer:
            if token >= FIRST:
                spans[token] = []
                here = spans[token]
            else:
                here.append(token)
        assert list(spans) == [FIRST + i for i in range(count)] and all(spans.values())
        back = [t for token in given for t in (spans[token] if token >= FIRST else [token])]
        assert back == text[:used].tolist()
        lengths += [len(span) for span in spans.values()]
    assert sum(lengths) == 20 * masked
    assert sum(lengths) / len(lengths) == pytest.approx(min(mean, masked), rel=0.2)
    assert masked / used == pytest.approx(share, abs=0.02) and used + 2 * count >= SIZE - 2


def test_a_prefix_is_given_and_the_rest_is_asked(monkeypatch):
    text, made = rows(300, 0, monkeypatch)
    starts = [int(asked.nonzero()[0]) for _, asked in made]
    assert all(torch.equal(row, text) and bool(asked[start:].all()) for (row, asked), start in zip(made, starts, strict=True))
    assert min(starts) >= 1 and max(starts) == SIZE - 1 and sum(starts) / 300 == pytest.approx(SIZE / 2, rel=0.1)


def test_shares_of_the_tasks():
    _, made = rows(2000)
    prefixes = sum(int(row.max()) < FIRST for row, _ in made)
    assert prefixes / 2000 == pytest.approx(0.5, abs=4 * (0.25 / 2000) ** 0.5)


def test_random_lengths():
    rng = torch.Generator().manual_seed(0)
    for total, parts in ((1, 1), (5, 5), (30, 7)):
        for _ in range(20):
            found = split(total, parts, rng)
            assert sum(found) == total and len(found) == parts and min(found) >= 1


def test_smallest_sequences():
    assert all(used + 2 * count <= 4 and 1 <= masked < used for used, masked, count in (sizes(4, s, m) for s, m in TASKS[1:]))
    with pytest.raises(InputError):
        sizes(3, 0.5, 3)


def marked(make_config, **settings):
    objective = {"name": "mixed_denoising", "marks": 8, **settings.pop("objective", {})}
    return make_config(model={"vocabulary": 265}, objective=objective, **settings)


def test_the_loss_is_the_mean_over_what_is_asked(make_config, make_loop):
    loop = make_loop(marked(make_config))
    batch = loop.stream.batch(0, 4)
    outcome = loop.objective(loop.module, batch, 0, torch.Generator().manual_seed(1))
    rng, total, count = torch.Generator().manual_seed(1), 0.0, 0
    logits = outcome.outputs[0].logits_BTV.detach().log_softmax(-1)
    for b in range(4):
        row, asked = loop.objective.row(torch.cat((batch.tokens_BT[b], batch.targets_BT[b, -1:])), 257, rng)
        for t in asked.nonzero().flatten().tolist():
            total, count = total - float(logits[b, t - 1, row[t]]), count + 1
    assert float(outcome.metrics["task"].detach()) == pytest.approx(total / count, rel=1e-4)
    assert float(outcome.metrics["asked"]) == count / (4 * 16)


def test_from_the_given_step_on_it_is_the_next_token(make_config, make_loop):
    loop = make_loop(marked(make_config, objective={"until": 3}))
    batch, rng = loop.stream.batch(0, 4), torch.Generator().manual_seed(0)
    plain = NextToken()(loop.module, batch, 3, rng).loss
    assert torch.allclose(loop.objective(loop.module, batch, 3, rng).loss, plain)
    assert not torch.allclose(loop.objective(loop.module, batch, 2, rng).loss, plain)


def test_it_trains_and_repeats(make_config, make_loop, tmp_path):
    config = marked(make_config, steps=3)
    for name in ("a", "b"):
        make_loop(config, tmp_path / name).run()
    first, second = ([e["loss"] for e in read(tmp_path / name) if "loss" in e] for name in ("a", "b"))
    assert first == second and len(first) == 3


def test_marks_that_the_text_has(make_config, make_loop):
    loop = make_loop(make_config(objective={"name": "mixed_denoising", "marks": 150}))
    with pytest.raises(InputError, match="marks begin at 107"):
        loop.run()


def test_too_few_marks(make_config, make_loop):
    loop = make_loop(make_config(model={"vocabulary": 258}, objective={"name": "mixed_denoising", "marks": 1}, steps=20))
    with pytest.raises(InputError, match="raise marks"):
        loop.run()


def test_documents_cannot_be_masked(make_config, make_loop):
    config = make_config(
        model={"vocabulary": 273}, data={"mask_documents": True}, objective={"name": "mixed_denoising", "marks": 16}
    )
    with pytest.raises(InputError, match="mask_documents"):
        make_loop(config).train_step()
