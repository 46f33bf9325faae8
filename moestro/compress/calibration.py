"""What a layer's matrices are multiplied with, from the tokens that the probe `inputs` kept.

Shapes: n tokens, D model width, K slots, E experts, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.compress.encode.inputs import PRIOR, ExpertInputs, Inputs
from moestro.core.errors import ProfileError
from moestro.core.experts import ExpertKey
from moestro.core.layer import ModelFacts
from moestro.core.plans.compression import Slot
from moestro.profile.profile import Profile

RARE = 32  # an expert that saw fewer of the kept tokens is named


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """The kept tokens of one layer. x_nD, weights_nK: float32; experts_nK: -1 in empty slots."""

    x_nD: np.ndarray
    experts_nK: np.ndarray
    weights_nK: np.ndarray

    def own(self, experts: tuple[int, ...]) -> np.ndarray:
        """Rows of the tokens that were routed to any of these experts."""
        return np.flatnonzero(np.isin(self.experts_nK, experts).any(1))

    def weight(self, expert: int) -> np.ndarray:
        """The combine weight of one expert on its own tokens."""
        hit_nK = self.experts_nK == expert
        return np.where(hit_nK, self.weights_nK, 0).sum(1)[hit_nK.any(1)]


class Calibration:
    """Gives each slot its `ExpertInputs`. A callable, as `compress.encoding.Encoder` wants it.

    prior: see `ExpertInputs`. Raises ProfileError when the profile is of another model or kept no inputs.
    """

    def __init__(self, profile: Profile, facts: ModelFacts, *, prior: int = PRIOR) -> None:
        profile.check_model(facts.fingerprint)
        self.facts, self.prior, self._profile = facts, prior, profile
        self._arrays = tuple(profile.need("inputs", f"kept_{name}") for name in ("x_LND", "experts_LNK", "weights_LNK"))
        self._layer: tuple[int, LayerInputs, np.ndarray] | None = None
        for la in facts.layers:
            if la.ordinal >= len(self._arrays[1]) or not self._arrays[1][la.ordinal].any():
                raise ProfileError(
                    f"the profile kept no inputs of MoE layer {la.ordinal}", fix="profile more text with --probe inputs"
                )

    def layer(self, ordinal: int) -> LayerInputs:
        """What is known of one layer; the last one asked for is kept."""
        if self._layer is None or self._layer[0] != ordinal:
            x_nD, experts_nK, weights_nK = (array[ordinal] for array in self._arrays)
            filled_n = np.flatnonzero(experts_nK.any(1))
            found = LayerInputs(
                x_nD[filled_n].view(np.float16).astype(np.float32),
                experts_nK[filled_n].astype(np.int64) - 1,
                weights_nK[filled_n].view(np.float16).astype(np.float32),
            )
            self._layer = ordinal, found, Inputs.of(found.x_nD).moment_CC
        return self._layer[1]

    def __call__(self, ordinal: int, slot: Slot) -> ExpertInputs:
        seen = self.layer(ordinal)
        assert self._layer is not None
        spec = self.facts.layers[ordinal].spec
        return ExpertInputs(seen.x_nD, seen.own(slot.sources), spec, self._layer[2], self.prior)

    def scaled(self, ordinal: int, rows_n: np.ndarray, scale_D: np.ndarray) -> ExpertInputs:
        """As a call, of chosen rows of the layer's tokens, divided by scale_D."""
        seen = self.layer(ordinal)
        assert self._layer is not None
        layer_DD, spec = self._layer[2] / np.outer(scale_D, scale_D), self.facts.layers[ordinal].spec
        return ExpertInputs(seen.x_nD / scale_D, rows_n, spec, layer_DD, self.prior)

    def stream(self) -> dict[str, np.ndarray]:
        """What the probe residual tells of each layer's experts beside the stream, as `BitsEvidence` names it; nothing without it."""
        found = {name: self._profile.arrays.get(f"{name}_L") for name in ("turned", "turning", "output_norm", "stream_norm")}
        if any(array is None for array in found.values()):
            return {}
        whole = {name: np.maximum(np.asarray(array, np.float64), 1e-30) for name, array in found.items()}
        return {"turned_L": whole["turned"] / whole["turning"], "share_L": whole["output_norm"] / whole["stream_norm"]}

    def rare(self) -> dict[ExpertKey, int]:
        """Experts that saw fewer than RARE of the kept tokens, and how many: their fit leans on the whole layer's inputs."""
        out = {}
        for la in self.facts.layers:
            counts_E = np.bincount(self._arrays[1][la.ordinal].reshape(-1), minlength=la.num_experts + 1)[1:]
            out |= {ExpertKey(la.ordinal, e): int(n) for e, n in enumerate(counts_E[: la.num_experts]) if n < RARE}
        return out
