"""A plan's encodings tried on a few made-up numbers: a wrong option or number format is found before any work."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError, MoestroError
from moestro.core.experts import ExpertWeights
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, check_options, load
from moestro.core.plans.compression import CompressionPlan, Encoding
from moestro.kernels.packed import GROUPS, TILE
from moestro.models.codecs.coded import coded_bytes

_WIDTH = max(GROUPS)


def rehearse(plan: CompressionPlan, facts: ModelFacts) -> None:
    """Raises InputError for an encoding that its method cannot make: an option, a codec, a pattern or group that does not divide."""
    spec = facts.layers[0].spec
    experts = {len(la.slots) for la in plan.layers}
    for encoding in plan.encodings:
        fn = load(encoding.method)
        card = card_of(fn)
        codec = {} if "codec" in encoding.options else {"codec": encoding.codec}
        check_options(card, encoding.options)
        if card.kind == "encode":
            _one(fn, encoding, _matrix(TILE, _WIDTH), Inputs.of(np.eye(_WIDTH, dtype=np.float32)), codec)
        elif card.kind == "sparsify":
            for width in (spec.d_model, plan.width(facts)):
                _one(fn, encoding, _matrix(2, width), np.ones(width, np.float32), {})
        elif card.kind == "share":
            for count in experts:
                fn([_expert] * count, **encoding.options)


def _one(
    fn: Callable[..., object], encoding: Encoding, w_RC: np.ndarray, given: Inputs | np.ndarray, codec: dict[str, str]
) -> None:
    if codec:
        coded_bytes(encoding.codec, w_RC.shape)  # raises for a codec that is none of few bits
    try:
        fn(w_RC, given, **codec, **encoding.options)
    except MoestroError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{encoding.method} cannot make {encoding.codec} with {encoding.options}: {error}") from error


def _matrix(rows: int, cols: int) -> np.ndarray:
    return np.sin(np.arange(rows * cols, dtype=np.float32)).reshape(rows, cols)


def _expert() -> ExpertWeights:
    return ExpertWeights(_matrix(2, 8), _matrix(2, 8), _matrix(8, 2))
