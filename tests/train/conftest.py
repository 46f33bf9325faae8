"""A small text of three domains, prepared once, and tiny runs over it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.layers.decoder import build
from moestro.train.config import TrainConfig, changed
from moestro.train.data.stream import Stream
from moestro.train.data.tokens import Tokens, prepare
from moestro.train.loop import Loop
from moestro.train.objective import make
from moestro.train.parallel import Group
from tests.train.methods import MODEL

DOMAINS = {"count": "one two three four five six ", "letters": "abc def ghi jkl mno pqr ", "digits": "3141 5926 5358 9793 "}


@pytest.fixture(autouse=True)
def one_thread():
    """Tests share two cores with others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(domain: str, count: int) -> str:
    rng = random.Random(domain)
    return " ".join(rng.choices(DOMAINS[domain].split(), k=count))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """About 3,000, 2,000 and 1,000 bytes of three domains."""
    documents = [(name, words(name, count)) for name, count in zip(DOMAINS, (600, 500, 200), strict=True)]
    return prepare(documents, "bytes", tmp_path_factory.mktemp("text") / "tokens")


@pytest.fixture
def make_config() -> Callable[..., TrainConfig]:
    """make_config(steps=4, model={"router": "switch"}, ...)."""

    def make_one(model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **settings: Any) -> TrainConfig:
        text = {"length": 16, "holdout": 0.1, **(data or {})}
        return changed({"model": MODEL | (model or {}), "data": text, "steps": 4, "batch": 4, **settings})

    return make_one


@pytest.fixture
def make_loop(tokens: Tokens, tmp_path: Path) -> Callable[..., Loop]:
    """make_loop(config, folder) over the small text, or the tokens given."""

    def make_one(config: TrainConfig, folder: Path | None = None, **given: Any) -> Loop:
        data, (micro, _) = config.data, config.micro(given.get("group", Group()).size)
        stream = Stream(
            given.pop("tokens", tokens),
            length=data.length,
            holdout=data.holdout,
            weights=data.weights,
            seed=config.seed,
            group=micro if data.pure else 1,
            documents=data.mask_documents,
        )
        where = folder or tmp_path / "run"
        where.mkdir(parents=True, exist_ok=True)
        given = {"objective": make(config.objective, "objective"), **given}
        return Loop(config, given.pop("module", None) or build(config.model), stream, where, **given)

    return make_one
