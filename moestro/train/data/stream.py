"""Which sequence comes when: packed sequences of all domains in an order that is a pure function of (seed, step).

A domain's ids are cut into sequences of S inputs and their S following targets; sequence i covers ids i*S to i*S+S. Some, spread evenly
over the domain and the same for every seed, are held out. A cycle goes through every domain's share in shuffled order; within a domain every sequence is used before one
is used again. Nothing is drawn from a stateful generator, so any step can be reached directly, which is what makes runs resumable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.train.data.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of equal length. tokens_BT, targets_BT: int64, the target is the next token. domain_B: int64, place in `Stream.names`.

    document_BT: int64, which document of its row a token is of, an end token being of the one it ends; None where rows are read whole.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    domain_B: Tensor
    document_BT: Tensor | None = None

    def positions(self) -> Tensor | None:
        """int64 [B, T]: each token's place in its document, counted from the row's beginning; None where rows are read whole."""
        if self.document_BT is None:
            return None
        place = torch.arange(self.document_BT.shape[1]).expand_as(self.document_BT)
        first = functional.pad(self.document_BT.diff(dim=1) != 0, (1, 0), value=True)
        return place - torch.where(first, place, 0).cummax(1).values


def drawn(seed: int, *place: int) -> int:
    """A number below 2^63 that depends on all arguments and on nothing else: the seed of whatever is random at that place."""
    mixed = 0
    for number in place:
        mixed = int(_source(seed, mixed).random_raw()) ^ number
    return int(_source(seed, mixed).random_raw()) >> 1


def shuffled(size: int, seed: int, *place: int) -> np.ndarray:
    """A permutation of range(size) that depends on the arguments only, not on numpy's version."""
    return np.argsort(_source(seed, drawn(seed, *place)).random_raw(size), kind="stable")


def _source(*key: int) -> np.random.Philox:
    """The counter-based generator of a pair of numbers; its raw output is defined by its algorithm."""
    return np.random.Philox(key=np.array([number & (2**64 - 1) for number in key], np.uint64))


class Stream:
    """Batches of training text, and the held-out rest.

    Args:
        tokens: prepared text. length: S, inputs per sequence.
        holdout: share of each domain's sequences that is never trained on (at least one sequence when above 0).
        weights: share of the training sequences by domain (any positive scale); {}: by the domains' sizes.
        group: sequences that follow one another in a batch and are of one domain; 1 mixes freely.
        documents: batches say which document each token is of.

    Raises InputError when a domain is shorter than it must be, or a weight names no domain.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        length: int,
        holdout: float,
        weights: Mapping[str, float],
        seed: int,
        group: int = 1,
        documents: bool = False,
    ) -> None:
        self.tokens, self.length, self.seed, self.group, self.documents = tokens, length, seed, group, documents
        self.names = tuple(domain.name for domain in tokens.domains)
        whole = [(domain.tokens - 1) // length for domain in tokens.domains]
        held = [max(1, round(n * holdout)) if holdout > 0 else 0 for n in whole]
        for domain, n, h in zip(tokens.domains, whole, held, strict=True):
            need = group + (holdout > 0)
            if n - h < group:
                raise InputError(
                    f"the text {domain.name!r} has {domain.tokens} tokens",
                    expected=f"{need * length + 1} or more: {group} training sequence{'s' * (group > 1)} of {length}"
                    + (" and one held out" if holdout > 0 else ""),
                    fix="give more text or a smaller data.length" + (", or data.holdout=0" if holdout > 0 else ""),
                )
        self.held_out = [
            np.array([(2 * j + 1) * n // (2 * h) for j in range(h)], np.int64) for n, h in zip(whole, held, strict=True)
        ]
        self.training = [np.setdiff1d(np.arange(n), out) for n, out in zip(whole, self.held_out, strict=True)]
        units = [len(places) // group for places in self.training]
        self._units = np.asarray(units, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._shares(units, weights))])
        self._order = lru_cache(maxsize=2 + 2 * len(units))(shuffled)

    def _shares(self, units: list[int], weights: Mapping[str, float]) -> list[int]:
        """Units of each domain in a cycle."""
        if not weights:
            return units
        if unknown := sorted(set(weights) - set(self.names)):
            raise InputError(f"data.weights names {', '.join(unknown)}", expected="of " + ", ".join(self.names))
        given = [float(weights.get(name, 0.0)) for name in self.names]
        if min(given) < 0 or sum(given) <= 0:
            raise InputError(f"data.weights is {dict(weights)}", expected="no weight below 0 and one above 0")
        return [max(1, round(w / sum(given) * sum(units))) if w > 0 else 0 for w in given]

    def place(self, number: int) -> tuple[int, int]:
        """(domain, sequence) of the training sequence with this running number."""
        unit, within = divmod(number, self.group)
        cycle, offset = divmod(unit, int(self._starts[-1]))
        slot = int(self._order(int(self._starts[-1]), self.seed, 0, cycle)[offset])
        domain = int(np.searchsorted(self._starts, slot, side="right")) - 1
        share = int(self._starts[domain + 1] - self._starts[domain])
        lap, at = divmod(cycle * share + slot - int(self._starts[domain]), int(self._units[domain]))
        order = self._order(int(self._units[domain]), self.seed, domain + 1, lap)
        return domain, int(self.training[domain][int(order[at]) * self.group + within])

    def batch(self, first: int, count: int) -> Batch:
        """The training sequences with running numbers first .. first+count-1."""
        return self.gather([self.place(first + i) for i in range(count)])

    def gather(self, places: list[tuple[int, int]]) -> Batch:
        """The sequences at these (domain, sequence) places."""
        size = self.length
        rows = np.stack([self.tokens.ids[d][s * size : s * size + size + 1].astype(np.int64) for d, s in places])
        ids = torch.from_numpy(rows)
        inputs_BT = ids[:, :-1].contiguous()
        ends_BT = (inputs_BT == self.tokens.end).long()
        document_BT = ends_BT.cumsum(1) - ends_BT if self.documents else None
        return Batch(inputs_BT, ids[:, 1:].contiguous(), torch.tensor([d for d, _ in places]), document_BT)

    def held_out_places(self, most: int) -> list[list[tuple[int, int]]]:
        """Per domain its held-out sequences, `most` of them spread evenly where there are more."""
        kept = [out if len(out) <= most else out[np.arange(most) * len(out) // most] for out in self.held_out]
        return [[(d, int(i)) for i in out] for d, out in enumerate(kept)]
