"""Every trainable method of the catalogue is reached from a training configuration, and its model learns."""

from __future__ import annotations

import pytest
import torch

from moestro.train.data.text import read
from moestro.train.data.tokens import prepare
from tests.train.methods import DIGITS, ROWS, settings


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    rows = [row for row, _ in zip(read("samples:digits"), range(200), strict=False)]
    return prepare(rows, "bytes", tmp_path_factory.mktemp("digits") / "tokens")


@pytest.mark.parametrize("name", ROWS)
def test_its_model_learns_and_every_parameter_takes_part(name, make_config, make_loop, digits):
    found = settings(name)
    loop = make_loop(make_config(**found), **({"tokens": digits} if found.get("data") is DIGITS else {}))
    before = {key: value.detach().clone() for key, value in loop.module.named_parameters()}
    losses = [loop.train_step()["loss"] for _ in range(6)]
    assert min(losses[-2:]) < 0.98 * losses[0], losses
    after = dict(loop.module.named_parameters())
    assert not [key for key, value in before.items() if after[key].requires_grad and torch.equal(value, after[key])]
