"""Perplexity of a text, and how far one model's predictions are from another's, for any core Runner.

Shapes: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.core.errors import InputError
from moestro.core.layer import Runner

_ROWS = 32  # tokens whose predictions are in float64 at once


@dataclass(frozen=True, slots=True)
class Quality:
    """tokens: that were predicted. nll: mean negative log-likelihood in nats. kl: mean divergence from the reference's predictions
    in nats, None without a reference."""

    tokens: int
    nll: float
    kl: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def measure(runner: Runner, sequences: Sequence[list[int]], reference: Runner | None = None) -> Quality:
    """Each sequence by itself: every token but its first is predicted from those before it.

    Raises InputError when no token is left to predict, or when a prediction is not a number.
    """
    tokens, nll, kl = 0, 0.0, 0.0
    outs = runner.run(list(sequences))
    others = reference.run(list(sequences)) if reference is not None else None
    for number, sequence in enumerate(sequences):
        logits_TV = next(iter(outs)).logits_TV
        there_TV = None if others is None else next(iter(others)).logits_TV
        for rows in _pieces(len(sequence) - 1):
            logp_TV = log_softmax(logits_TV[rows])
            nll -= float(logp_TV[np.arange(len(logp_TV)), sequence[rows.start + 1 : rows.stop + 1]].sum())
            if there_TV is not None:
                want_TV = log_softmax(there_TV[rows])
                kl += float((np.exp(want_TV) * (want_TV - logp_TV)).sum())
        tokens += max(0, len(sequence) - 1)
        if not math.isfinite(nll) or not math.isfinite(kl):
            raise InputError(f"the predictions of sequence {number} are not numbers", fix="check the model's weights")
    if not tokens:
        raise InputError("there is no token to predict", expected="sequences of at least two tokens", fix="give more text")
    return Quality(tokens, nll / tokens, None if reference is None else max(0.0, kl / tokens))


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """log-probabilities in float64."""
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cut(ids: Sequence[int], length: int, start: Sequence[int] = ()) -> list[list[int]]:
    """Sequences of `length` tokens from one long text, each beginning with `start`; what is left over at the end is dropped."""
    step = length - len(start)
    return [[*start, *ids[at : at + step]] for at in range(0, len(ids) - step + 1, step)]


def _pieces(tokens: int) -> Iterator[slice]:
    for at in range(0, tokens, _ROWS):
        yield slice(at, min(at + _ROWS, tokens))
