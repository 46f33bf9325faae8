"""A planted model, opened, and texts of its domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moestro.profile.data import Texts, cut
from moestro.profile.probe import make
from moestro.profile.profile import Profile
from moestro.profile.run import Recording
from moestro.profile.sources import Document
from moestro.testing.planted import Planted, domain_model


@dataclass(frozen=True)
class Case:
    planted: Planted
    model: Any
    texts: Texts

    def record(self, *names: str, runner: Any = None, texts: Texts | None = None, **options: Any) -> Recording:
        recording = Recording(runner or self.model, texts or self.texts, make({n: {} for n in names}), **options)
        recording.run(runner or self.model)
        return recording

    def profile(self, *names: str, **options: Any) -> Profile:
        return self.record(*names, **options).profile()


def documents(planted: Planted) -> list[Document]:
    """Sequence i is of domain i modulo 3, called a, b or c."""
    return [Document("abc"[i % 3], "planted", tokens=list(s)) for i, s in enumerate(planted.sequences)]


@pytest.fixture(scope="session")
def case(tmp_path_factory) -> Case:
    from moestro.models.open import open_model

    torch.set_num_threads(1)
    planted = domain_model(tmp_path_factory.mktemp("profile") / "model", sequences=9, length=40, d_expert=32)
    return Case(planted, open_model(planted.path), cut(documents(planted), None, length=24, stride=16))
