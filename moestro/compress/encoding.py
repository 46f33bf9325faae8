"""Carries out a plan's encodings on the matrices of slots and of the trunk, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moestro.compress.calibration import Calibration
from moestro.compress.encode.inputs import ExpertInputs, Inputs
from moestro.compress.smooth.smoothing import Smoothing
from moestro.compress.stats import LayerStats
from moestro.core.errors import CheckpointError, PlanError
from moestro.core.experts import ExpertWeights
from moestro.core.layer import ModelFacts
from moestro.core.method import card_of, load
from moestro.core.plans.compression import STORED, CompressionPlan, LayerChange, Slot
from moestro.kernels.packed import Packed
from moestro.profile.profile import Profile

MATRICES = {"gate": "gate_FD", "up": "up_FD", "down": "down_DF"}
Given = Callable[[int, Slot], ExpertInputs]  # what the matrices of a slot are multiplied with


class Encoder:
    """Methods of kind 'encode' are called as fn(w_RC, inputs, codec=..., **options), those of kind 'sparsify' as fn(w_RC, norm_C,
    **options), where norm_C is the length of each input over the tokens of the slot. Both give a new matrix of the same shape, plain or
    in tiles; where plain numbers are asked for, tiles become the numbers they stand for.

    A method of kind 'smooth' rescales a whole layer before what comes after it: see `compress.smooth`. Experts then come out for inputs
    in the new scale, so whoever writes them rescales the trunk's tensors that `smoothing` touches as well.

    A method of kind 'share' finds from all experts of a layer the directions on which each of their matrices is projected.

    profile: the statistics that 'sparsify' reads. given: the inputs that calibrated methods of kind 'encode' read; by default those
    that the profile kept.
    """

    def __init__(
        self, plan: CompressionPlan, facts: ModelFacts, profile: Profile | None = None, given: Given | None = None
    ) -> None:
        self.plan, self.facts, self.profile, self.given = plan, facts, profile, given
        self._methods = [load(e.method) for e in plan.encodings]
        self._smoothed: dict[int, tuple[Smoothing, dict[Slot, int]]] = {}
        self._shared: dict[tuple[int, int], dict[Slot, Mapping[str, np.ndarray]]] = {}
        if given is None and profile is not None and "kept_x_LND" in profile.arrays:
            self.given = given = Calibration(profile, facts)
        self._kinds = [card_of(fn).kind for fn in self._methods]
        for encoding, kind, fn in zip(plan.encodings, self._kinds, self._methods, strict=True):
            if kind not in ("encode", "encode_router", "share", "sparsify", "smooth"):
                raise PlanError(f"{encoding.method} is a method of kind {kind!r}", expected="one of kind 'encode' or 'sparsify'")
            if kind in ("smooth", "encode_router") and not isinstance(given, Calibration):
                raise PlanError(f"{encoding.method} reads inputs", fix="give a profile made with --probe inputs")
            if kind == "sparsify" and profile is None:
                raise PlanError(f"{encoding.method} reads statistics", fix="give the profile with --profile")
            if kind == "sparsify" and profile is not None:
                for name in ("gated_moment_LED", "gated_hidden_LEF"):
                    profile.need("moments", name)
            if kind == "encode" and given is None and "inputs" in card_of(fn).needs:
                raise PlanError(
                    f"{encoding.method} reads what the matrices are multiplied with",
                    fix="give a profile made with --probe inputs",
                )

    @property
    def smooths(self) -> bool:
        """Whether layers are rescaled."""
        return "smooth" in self._kinds

    def prepare(self, change: LayerChange, read: Callable[[Slot], ExpertWeights], router: Callable[[], np.ndarray]) -> None:
        """Find what all slots of a layer share, before they are encoded side by side. read, router: the weights before any encoding."""
        if isinstance(self.given, Calibration):
            self.given.layer(change.ordinal)
        self.smoothing(change, read, router)
        self._share(change, read)

    def _share(self, change: LayerChange, read: Callable[[Slot], ExpertWeights]) -> None:
        """What the slots of a layer are projected on. Raises PlanError."""
        for number in sorted({n for slot in change.slots for n in slot.encodings if self._kinds[n] == "share"}):
            if any(slot.encodings[:1] != (number,) for slot in change.slots):
                raise PlanError(
                    f"layer {change.ordinal} shares directions in part, or after other encodings",
                    expected="the first encoding of all its experts",
                )
            readers = [partial(read, slot) for slot in change.slots]
            bases = self._methods[number](readers, **self.plan.encodings[number].options)
            self._shared = {(change.ordinal, number): dict(zip(change.slots, bases, strict=True))}

    def smoothing(
        self, change: LayerChange, read: Callable[[Slot], ExpertWeights], router: Callable[[], np.ndarray]
    ) -> Smoothing | None:
        """How a layer is rescaled, found once. None when the plan does not smooth. Raises PlanError."""
        numbers = {n for slot in change.slots for n in slot.encodings if self._kinds[n] == "smooth"}
        if not numbers:
            return None
        if len(numbers) > 1 or any(slot.encodings[0] not in numbers for slot in change.slots):
            raise PlanError(
                f"layer {change.ordinal} is smoothed several times, in part, or after other encodings",
                expected="one smoothing, the first encoding of all its experts",
            )
        if change.ordinal not in self._smoothed:
            assert isinstance(self.given, Calibration)
            number, slots = numbers.pop(), change.slots
            seen, spec = self.given.layer(change.ordinal), self.facts.layers[change.ordinal].spec
            found = self._methods[number](
                seen, slots, lambda i: read(slots[i]), router(), spec, **self.plan.encodings[number].options
            )
            self._smoothed[change.ordinal] = found, {slot: i for i, slot in enumerate(slots)}
        return self._smoothed[change.ordinal][0]

    def router(self, ordinal: int, numbers: tuple[int, ...], router_ED: np.ndarray, scale_D: np.ndarray | None) -> np.ndarray:
        """A router's weights after their encodings. scale_D: what its inputs are divided by. Raises PlanError."""
        assert isinstance(self.given, Calibration)
        x_nD, facts = self.given.layer(ordinal).x_nD, self.facts.layers[ordinal]
        for number in numbers:
            encoding = self.plan.encodings[number]
            if self._kinds[number] != "encode_router":
                raise PlanError(f"{encoding.method} is not for routers", expected="a method of kind 'encode_router'")
            given_nD = x_nD if scale_D is None else x_nD / scale_D
            router_ED = self._methods[number](router_ED, given_nD, facts.top_k, **encoding.options)
        return router_ED

    def takes_stored(self, numbers: tuple[int, ...]) -> bool:
        """Whether these encodings can begin from numbers as a checkpoint stores them: then nobody makes a copy in float32."""
        return len(numbers) == 1 and "stored" in card_of(self._methods[numbers[0]]).traits

    def expert(self, ordinal: int, slot: Slot, weights: ExpertWeights) -> ExpertWeights:
        """The slot's weights after its encodings; biases stay."""
        for number in slot.encodings:
            made = self._step(ordinal, slot, weights, number)
            weights = replace(weights, **{MATRICES[role]: plain(matrix) for role, matrix in made.items()})
        return weights

    def tiles(self, ordinal: int, slot: Slot, weights: ExpertWeights) -> dict[str, np.ndarray | Packed]:
        """As `expert`, the matrices by role, and tiles stay tiles. weights: as stored where the slot's encodings take that."""
        if self.takes_stored(slot.encodings):
            return self._step(ordinal, slot, weights, slot.encodings[0])
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
        elif self._kinds[number] == "share":
            there = {role: a for role, name in MATRICES.items() if (a := getattr(weights, name)) is not None}
            return {r: _projected(a, self._shared[ordinal, number][slot].get(r)) for r, a in there.items()}
        elif self._kinds[number] == "smooth":
            smoothing, place = self._smoothing_of(ordinal, slot)
            made = smoothing.applied(place, weights)
            return {role: a for role, name in MATRICES.items() if (a := getattr(made, name)) is not None}
        elif "inputs" in card_of(self._methods[number]).needs:
            return encoded(weights, self._inputs(ordinal, slot), partial(self._one, number), self.plan.encodings[number].chained)
        else:
            given = {}
        there = {role: a for role, name in MATRICES.items() if (a := getattr(weights, name)) is not None}
        return {role: self._one(number, matrix, given.get(role)) for role, matrix in there.items()}

    def _inputs(self, ordinal: int, slot: Slot) -> ExpertInputs:
        """Of a slot's matrices, in the scale that the layer's smoothing gave them."""
        assert self.given is not None
        if self._kinds[slot.encodings[0]] != "smooth":
            return self.given(ordinal, slot)
        assert isinstance(self.given, Calibration)
        smoothing, place = self._smoothing_of(ordinal, slot)
        return self.given.scaled(ordinal, smoothing.rows[place], smoothing.scale_D)

    def _smoothing_of(self, ordinal: int, slot: Slot) -> tuple[Smoothing, int]:
        """Of a layer that was prepared, and the slot's place in it."""
        smoothing, places = self._smoothed[ordinal]
        return smoothing, places[slot]

    def matrix(self, name: str, numbers: tuple[int, ...], w_RC: np.ndarray) -> np.ndarray | Packed:
        """A trunk matrix after its encodings, plain or in tiles. w_RC: as stored where the encodings take that."""
        made: np.ndarray | Packed = w_RC
        for number in numbers:
            if self._kinds[number] in ("share", "sparsify") or "inputs" in card_of(self._methods[number]).needs:
                raise PlanError(
                    f"{self.plan.encodings[number].method} has no statistics of {name}",
                    fix="encode it with a method that needs none",
                )
            made = self._one(number, plain(made), None)
        return made

    def _one(self, number: int, w_RC: np.ndarray, given: Any) -> np.ndarray | Packed:
        encoding = self.plan.encodings[number]
        codec = {"codec": encoding.codec} if self._kinds[number] == "encode" and "codec" not in encoding.options else {}
        try:
            return self._methods[number](np.ascontiguousarray(w_RC), given, **codec, **encoding.options)
        except ValueError as error:
            raise CheckpointError(
                f"a matrix cannot be stored as {encoding.codec}: {error}", fix="leave it as it is stored, or use another codec"
            ) from error


def one_thread(plan: CompressionPlan) -> AbstractContextManager[Any]:
    """Where weights get few bits, sums are those of one thread of the linear algebra: the bytes depend on no number of threads."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1) if any(e.codec != STORED for e in plan.encodings) else nullcontext()


def encoded(
    weights: ExpertWeights, inputs: ExpertInputs, one: Callable[[np.ndarray, Inputs], np.ndarray | Packed], chained: bool
) -> dict[str, np.ndarray | Packed]:
    """An expert's matrices by role, each made by `one` from itself and its inputs. chained: see `core.plans.compression.Encoding`."""
    first = inputs.first()
    made = {role: one(a, first) for role in ("gate", "up") if (a := getattr(weights, MATRICES[role])) is not None}
    if not chained:
        return made | {"down": one(weights.down_DF, inputs.last(weights))}
    giving = replace(weights, **{MATRICES[role]: plain(matrix) for role, matrix in made.items()})
    last, down_DF = inputs.chained(weights, giving)
    return made | {"down": one(down_DF, last)}


def _projected(w_RC: np.ndarray, basis_MC: np.ndarray | None) -> np.ndarray:
    return w_RC if basis_MC is None else ((w_RC @ basis_MC.T) @ basis_MC).astype(np.float32)


def plain(matrix: np.ndarray | Packed) -> np.ndarray:
    """The numbers that a matrix stands for."""
    return matrix.dequantise() if isinstance(matrix, Packed) else matrix
