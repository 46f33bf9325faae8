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
    """Of each predicted token, in nats: nll_N, the negative log-likelihood, and kl_N, the divergence from the reference's predictions
    (None without a reference)."""

    nll_N: np.ndarray
    kl_N: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.nll_N)

    @property
    def nll(self) -> float:
        return float(self.nll_N.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def kl(self) -> float | None:
        return None if self.kl_N is None else max(0.0, float(self.kl_N.mean()))


def measure(runner: Runner, sequences: Sequence[list[int]], reference: Runner | None = None) -> Quality:
    """Each sequence by itself: every token but its first is predicted from those before it.

    Raises InputError when no token is left to predict, or when a prediction is not a number.
    """
    nll: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    outs = runner.run(list(sequences))
    others = reference.run(list(sequences)) if reference is not None else None
    for number, sequence in enumerate(sequences):
        logits_TV = next(iter(outs)).logits_TV
        there_TV = None if others is None else next(iter(others)).logits_TV
        for rows in _pieces(len(sequence) - 1):
            logp_TV = log_softmax(logits_TV[rows])
            nll.append(-logp_TV[np.arange(len(logp_TV)), sequence[rows.start + 1 : rows.stop + 1]])
            if there_TV is not None:
                want_TV = log_softmax(there_TV[rows])
                kl.append((np.exp(want_TV) * (want_TV - logp_TV)).sum(-1))
            if not all(np.isfinite(found[-1]).all() for found in (nll, kl) if found):
                raise InputError(f"the predictions of sequence {number} are not numbers", fix="check the model's weights")
    if not nll:
        raise InputError("there is no token to predict", expected="sequences of at least two tokens", fix="give more text")
    return Quality(np.concatenate(nll), None if reference is None else np.concatenate(kl))


def error_of(values_N: np.ndarray) -> float:
    """The standard error of their mean, as if they were independent."""
    return float(values_N.std() / math.sqrt(len(values_N)))


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
