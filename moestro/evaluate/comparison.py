"""A changed model against its original on the same tokens: perplexities, divergence, and whether the routers still choose alike.

Shapes: T tokens, K slots, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moestro.core.layer import LayerRecord, ModelFacts, Runner, RunnerOutput
from moestro.evaluate.perplexity import Quality, error_of, measure

Origins = Sequence[Sequence[Sequence[int]]]  # of each layer and new expert, the old experts it is made of


@dataclass(frozen=True, slots=True)
class Comparison:
    """quality: of the changed model, with KL to the original; reference: of the original. agreement: share of the original's choices
    that the changed model makes too, one that went into a merged expert counting as made; agreement_L: by layer. skipped: the share of
    the changed model's slots that stayed empty beyond the original's."""

    quality: Quality
    reference: Quality
    agreement: float
    agreement_L: tuple[float, ...]
    skipped: float = 0.0

    @property
    def kl_error(self) -> float:
        assert self.quality.kl_N is not None
        return error_of(self.quality.kl_N)


def compare(changed: Runner, original: Runner, sequences: Sequence[list[int]], origins: Origins) -> Comparison:
    """Both models read every sequence once. Raises InputError when there is no token to predict."""
    told = _Replayed(original, sequences)
    seen = _Replayed(changed, sequences)
    quality = measure(seen, sequences, told)
    same_L = [0] * len(origins)
    total_L = [0] * len(origins)
    for mine, theirs in zip(seen.records, told.records, strict=True):
        for layer, (new, old) in enumerate(zip(mine, theirs, strict=True)):
            same, total = _agreeing(new, old, origins[layer])
            same_L[layer] += same
            total_L[layer] += total
    ran, could = (sum(int((_numpy(r.routing.experts_TK) >= 0).sum()) for rs in run.records for r in rs) for run in (seen, told))
    shares = tuple(same / max(1, total) for same, total in zip(same_L, total_L, strict=True))
    reference, agreement = Quality(np.concatenate(told.nll)), sum(same_L) / max(1, sum(total_L))
    return Comparison(quality, reference, agreement, shares, max(0.0, 1 - ran / max(1, could)))


class _Replayed:
    """A runner that keeps the records of what it ran, and each token's negative log-likelihood."""

    def __init__(self, runner: Runner, sequences: Sequence[list[int]]) -> None:
        self.runner, self.sequences = runner, sequences
        self.records: list[tuple[LayerRecord, ...]] = []
        self.nll: list[np.ndarray] = []

    @property
    def facts(self) -> ModelFacts:
        return self.runner.facts

    def run(self, tokens_BT: list[list[int]], *, inputs: bool = False) -> Iterator[RunnerOutput]:
        for tokens, out in zip(tokens_BT, self.runner.run(tokens_BT, inputs=inputs), strict=True):
            self.records.append(out.records)
            self.nll.append(_nll(_numpy(out.logits_TV), tokens))
            yield RunnerOutput(_numpy(out.logits_TV), ())


def _nll(logits_TV: np.ndarray, tokens: list[int]) -> np.ndarray:
    from moestro.evaluate.perplexity import log_softmax

    return -log_softmax(logits_TV[:-1])[np.arange(len(tokens) - 1), tokens[1:]]


def _agreeing(new: LayerRecord, old: LayerRecord, origins: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(the original's choices that the changed model makes too, all of the original's choices)."""
    old_TK, new_TK = _numpy(old.routing.experts_TK), _numpy(new.routing.experts_TK)
    experts = int(max(old_TK.max(), *(max(o) for o in origins))) + 1
    made_of_EE = np.zeros((len(origins) + 1, experts), bool)  # the last row is the empty slot, -1
    for e, sources in enumerate(origins):
        made_of_EE[e, list(sources)] = True
    reached_TE = made_of_EE[new_TK].any(1)
    chosen = old_TK >= 0
    return int((np.take_along_axis(reached_TE, np.maximum(old_TK, 0), 1) & chosen).sum()), int(chosen.sum())


def _numpy(array: object) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    tensor = array.detach().cpu()  # type: ignore[attr-defined]
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
