"""Carries out a plan's encodings on the matrices of slots and of the trunk, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moestro.compress.calibration import Calibration
from moestro.compress.stats import LayerStats
from moestro.core.errors import PlanError
from moestro.core.experts import ExpertWeights
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, load
from moestro.core.plans.compression import CompressionPlan, Slot
from moestro.kernels.packed import Packed
from moestro.profile.profile import Profile

MATRICES = {"gate": "gate_FD", "up": "up_FD", "down": "down_DF"}
Given = Callable[[int, Slot, ExpertWeights], Mapping[str, Any]]  # what each matrix of a slot is multiplied with, by role


class Encoder:
    """Methods of kind 'encode' are called as fn(w_RC, inputs, codec=..., **options), those of kind 'sparsify' as fn(w_RC, norm_C,
    **options), where norm_C is the length of each input over the tokens of the slot. Both give a new matrix of the same shape, plain or
    in tiles; where plain numbers are asked for, tiles become the numbers they stand for.

    profile: the statistics that 'sparsify' reads. given: the inputs that calibrated methods of kind 'encode' read; by default those
    that the profile kept.
    """

    def __init__(
        self, plan: CompressionPlan, facts: ModelFacts, profile: Profile | None = None, given: Given | None = None
    ) -> None:
        self.plan, self.facts, self.profile, self.given = plan, facts, profile, given
        self._methods = [load(e.method) for e in plan.encodings]
        if given is None and profile is not None and "kept_x_LND" in profile.arrays:
            self.given = given = Calibration(profile, facts)
        self._kinds = [card_of(fn).kind for fn in self._methods]
        for encoding, kind, fn in zip(plan.encodings, self._kinds, self._methods, strict=True):
            if kind not in ("encode", "sparsify"):
                raise PlanError(f"{encoding.method} is a method of kind {kind!r}", expected="one of kind 'encode' or 'sparsify'")
            if kind == "sparsify" and profile is None:
                raise PlanError(f"{encoding.method} reads statistics", fix="give the profile with --profile")
            if kind == "encode" and given is None and "inputs" in card_of(fn).needs:
                raise PlanError(
                    f"{encoding.method} reads what the matrices are multiplied with",
                    fix="give a profile made with --probe inputs",
                )

    def prepare(self, ordinal: int) -> None:
        """Read what all slots of a layer share, before they are encoded side by side."""
        if isinstance(self.given, Calibration):
            self.given.layer(ordinal)

    def expert(self, ordinal: int, slot: Slot, weights: ExpertWeights) -> ExpertWeights:
        """The slot's weights after its encodings; biases stay."""
        for number in slot.encodings:
            made = self._step(ordinal, slot, weights, number)
            weights = replace(weights, **{MATRICES[role]: plain(matrix) for role, matrix in made.items()})
        return weights

    def tiles(self, ordinal: int, slot: Slot, weights: ExpertWeights) -> dict[str, np.ndarray | Packed]:
        """As `expert`, the matrices by role, and tiles stay tiles."""
        made: dict[str, np.ndarray | Packed] = {r: a for r, name in MATRICES.items() if (a := getattr(weights, name)) is not None}
        for number in slot.encodings:
            weights = replace(weights, **{MATRICES[role]: plain(matrix) for role, matrix in made.items()})
            made = self._step(ordinal, slot, weights, number)
        return made

    def _step(self, ordinal: int, slot: Slot, weights: ExpertWeights, number: int) -> dict[str, np.ndarray | Packed]:
        if self._kinds[number] == "sparsify":
            assert self.profile is not None
            stats = LayerStats(self.profile, ordinal)
            given: Mapping[str, Any] = {role: stats.lengths(role, slot, weights) for role in MATRICES}
        else:
            needed = "inputs" in card_of(self._methods[number]).needs
            given = self.given(ordinal, slot, weights) if needed and self.given is not None else {}
        there = {role: a for role, name in MATRICES.items() if (a := getattr(weights, name)) is not None}
        return {role: self._one(number, matrix, given.get(role)) for role, matrix in there.items()}

    def matrix(self, name: str, numbers: tuple[int, ...], w_RC: np.ndarray) -> np.ndarray | Packed:
        """A trunk matrix after its encodings, plain or in tiles."""
        made: np.ndarray | Packed = w_RC
        for number in numbers:
            if self._kinds[number] == "sparsify" or "inputs" in card_of(self._methods[number]).needs:
                raise PlanError(
                    f"{self.plan.encodings[number].method} has no statistics of {name}",
                    fix="encode it with a method that needs none",
                )
            made = self._one(number, plain(made), None)
        return made

    def _one(self, number: int, w_RC: np.ndarray, given: Any) -> np.ndarray | Packed:
        encoding = self.plan.encodings[number]
        codec = {"codec": encoding.codec} if self._kinds[number] == "encode" and "codec" not in encoding.options else {}
        return self._methods[number](np.ascontiguousarray(w_RC), given, **codec, **encoding.options)


def plain(matrix: np.ndarray | Packed) -> np.ndarray:
    """The numbers that a matrix stands for."""
    return matrix.dequantise() if isinstance(matrix, Packed) else matrix
