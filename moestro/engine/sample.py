"""Choosing the next token from logits. Order and semantics are those of transformers' logits processors.

Repetition penalty, temperature, top-k, top-p, min-p, then one draw. Each sequence has its own generator, so that batching
changes no sequence's draws. Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moestro.core.errors import InputError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. temperature 0 means greedy; top_k 0, top_p 1 and min_p 0 mean no limit; penalty 1 none.

    stop: texts that end the answer and are not part of it. ignore_eos: go on to max_tokens whatever the model says.
    seed: of each sequence's own generator, so that batching changes nothing; None draws fresh.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)!r}", expected=expected, fix=f"choose another {name}")

        need(self.max_tokens >= 1, "max_tokens", "1 or more")
        need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or a positive number")
        need(self.top_k >= 0, "top_k", "0 (no limit) or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        need(0 < self.repetition_penalty < float("inf"), "repetition_penalty", "a positive number, 1 for none")
        need(self.seed is None or self.seed >= 0, "seed", "0 or more, or none")
        need(all(self.stop), "stop", "texts that are not empty")


def softmax(scores_V: np.ndarray) -> np.ndarray:
    """Probabilities, float32, of scores that may hold -inf."""
    e_V = np.exp(scores_V - scores_V.max())
    return e_V / e_V.sum()


def penalise(scores_V: np.ndarray, seen: Iterable[int], penalty: float) -> np.ndarray:
    """Divide positive and multiply negative scores of the tokens in `seen` by `penalty` (arXiv 1909.05858)."""
    out_V = scores_V.copy()
    ids = np.unique(np.fromiter(seen, np.int64))
    chosen = out_V[ids]
    out_V[ids] = np.where(chosen < 0, chosen * np.float32(penalty), chosen / np.float32(penalty))
    return out_V


def limit(scores_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, then top-k, top-p and min-p: scores with -inf where a token is excluded. The best token always stays."""
    out_V = scores_V / np.float32(params.temperature)
    if params.top_k and params.top_k < out_V.size:
        out_V = np.where(out_V < np.partition(out_V, -params.top_k)[-params.top_k], -np.inf, out_V)
    if params.top_p < 1:
        order = np.argsort(out_V, kind="stable")
        gone = np.cumsum(softmax(out_V[order]), dtype=np.float32) <= np.float32(1 - params.top_p)
        gone[-1] = False
        out_V[order[gone]] = -np.inf
    if params.min_p > 0:
        probs_V = softmax(out_V)
        gone = probs_V < np.float32(params.min_p) * probs_V.max()
        gone[int(out_V.argmax())] = False
        out_V = np.where(gone, -np.inf, out_V)
    return out_V


class Sampler:
    """Draws one sequence's tokens; keeps its random state and the tokens it has seen."""

    def __init__(self, params: SamplingParams, prompt: Iterable[int]) -> None:
        self.params = params
        self.seen = set(prompt)
        self.rng = np.random.default_rng(params.seed)

    def __call__(self, logits_V: np.ndarray) -> int:
        """The next token; ties go to the lowest id when greedy."""
        scores_V = np.asarray(logits_V, np.float32)
        if self.params.repetition_penalty != 1 and self.seen:
            scores_V = penalise(scores_V, self.seen, self.params.repetition_penalty)
        if self.params.temperature == 0:
            token = int(scores_V.argmax())
        else:
            cumulative_V = np.cumsum(softmax(limit(scores_V, self.params)), dtype=np.float64)
            token = int(np.searchsorted(cumulative_V, self.rng.random() * cumulative_V[-1], side="right"))
        self.seen.add(token)
        return token
