"""The objective that moves the weight of one loss."""

from __future__ import annotations

import pytest
import torch

from moestro.core.errors import InputError
from moestro.train.log import read
from moestro.train.objectives.adaptive import Adaptive


def factors(series, **options):
    adaptive = Adaptive(**{"warmup": 4, "every": 2, **options})
    return [adaptive.factor(torch.tensor(value), step) for step, value in enumerate(series)]


def test_constant_through_warm_up_and_while_nothing_is_known():
    assert factors([5.0, 3.0, 8.0, 1.0], warmup=100) == [1.0] * 4
    assert factors([1.0] * 3, warmup=0) == [1.0] * 3, "one window says nothing"


def test_it_follows_the_ratio_of_windows_in_a_line():
    # Means of the windows: 1, 1, 0.5, 0.5 * 1.5; targets from step 4 on: 1 (ratio 1), 0.5, 0.75.
    found = factors([1, 1, 1, 1, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75])
    assert found == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.625])


def test_rises_are_at_least_so_large_and_the_cap_holds():
    slow = [1.0 * 1.001 ** (step // 2) for step in range(8)]
    assert factors(slow)[5] == pytest.approx(1 + 0.025 / 2, rel=1e-4)
    fast = [3.0 ** (step // 2) for step in range(14)]
    assert max(factors(fast)) == 4.0 and factors(fast)[-2:] == [4.0, 4.0]


def test_micro_batches_are_averaged():
    one, many = Adaptive(warmup=0, every=2), Adaptive(warmup=0, every=2)
    for step in range(9):
        value = 1 + (step * 7 % 5) / 10
        a = one.factor(torch.tensor(value), step)
        for part in (value - 0.1, value + 0.1):
            b = many.factor(torch.tensor(part), step)
        assert a == pytest.approx(b, rel=1e-6)


ROUTER = {"name": "blockffn", "chunk": 4, "chunk_sparsity": 0.5}


def test_a_resumed_run_has_the_same_factors(make_config, make_loop, tmp_path):
    objective = {"name": "adaptive", "warmup": 0, "every": 2}
    config = make_config(steps=9, model={"router": ROUTER, "gated": False}, objective=objective, save_every=5)
    whole = make_loop(config, tmp_path / "whole")
    whole.run()
    first = make_loop(config, tmp_path / "cut")
    first.run(stop=lambda: first.step == 5)
    second = make_loop(config, tmp_path / "cut")
    assert second.resume() and second.step == 5
    second.run()
    a, b = ([(e["factor"], e["loss"]) for e in read(folder) if "loss" in e] for folder in (tmp_path / "whole", tmp_path / "cut"))
    assert a == b and len({factor for factor, _ in a}) > 3
    entry = next(e for e in read(tmp_path / "whole") if e.get("step") == 9 and "loss" in e)
    total = entry["task"] + entry["factor"] * entry["chunk_sparsity"] + entry["locality"]
    assert entry["loss"] == pytest.approx(total, rel=1e-5)


def test_a_model_without_that_loss(make_config, make_loop):
    loop = make_loop(make_config(objective="adaptive"))
    with pytest.raises(InputError, match="chunk_sparsity"):
        loop.run()
