"""A layer's statistics as criteria read them: a profile's arrays, cut to the layer and to the experts that are still there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from moestro.compress.slots import along_neurons
from moestro.core.errors import InputError, ProfileError
from moestro.core.experts import ExpertWeights
from moestro.core.plans.compression import Slot
from moestro.profile.profile import Profile


@dataclass(frozen=True, slots=True)
class LayerStats:
    """One MoE layer of a profile. experts: the ids asked for, in this order; None for all. E below counts those."""

    profile: Profile
    ordinal: int
    experts: tuple[int, ...] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """num_experts, top_k, shared, ... as the profile keeps them."""
        return self.profile.layers[self.ordinal]

    @property
    def ids_E(self) -> np.ndarray:
        return np.arange(self.facts["num_experts"]) if self.experts is None else np.asarray(self.experts)

    @property
    def num(self) -> int:
        return len(self.ids_E)

    @property
    def tokens(self) -> int:
        return self.profile.tokens

    def need(self, probe: str, name: str) -> np.ndarray:
        """A statistic of this layer: `need("norms", "norm_LE")` is norm_E, "usage_GLE" is usage_GE, "cosine_LEE" cosine_EE.

        Raises ProfileError when the profile was made without it, or lacks the layer.
        """
        array, axes = self.profile.need(probe, name), name.rpartition("_")[2]
        if self.ordinal >= array.shape[axes.index("L")]:
            _lacks(f"the profile's {name} ends before MoE layer {self.ordinal}")
        array = np.take(array, self.ordinal, axes.index("L"))
        for axis, letter in enumerate(axes.replace("L", "")):
            if letter == "E":
                array = np.take(array, self.ids_E, axis)
        return array

    def counts(self) -> np.ndarray:
        """counts_E: on how many tokens each expert was chosen."""
        return self.need("counts", "counts_LE").astype(np.float64)

    def means(self, probe: str, name: str) -> np.ndarray:
        """A sum per expert over its tokens, divided by them; 0 for an expert that has none."""
        total_E, count_E = self.need(probe, name).astype(np.float64), self.counts()
        return np.divide(total_E, count_E, out=np.zeros_like(total_E), where=count_E > 0)

    def lengths(self, role: str, slot: Slot, weights: ExpertWeights) -> np.ndarray:
        """norm_C of the inputs of a slot's matrix, times the gate: sqrt of the sum over its tokens of (g x_c)^2, all 0 for a slot that saw none.

        role: 'gate', 'up' or 'down'. The tokens of a merged slot are those of all its sources.
        """
        whole = LayerStats(self.profile, self.ordinal)
        if role != "down":
            return np.sqrt(whole.need("moments", "gated_moment_LED")[list(slot.sources)].sum(0))
        hidden_EF = whole.need("moments", "gated_hidden_LEF")[:, : self.facts["spec"]["d_expert"]]
        orders = [np.asarray(a) if a else None for a in slot.alignments] or [None] * len(slot.sources)
        rows = [along_neurons("up_F", hidden_EF[e], order) for e, order in zip(slot.sources, orders, strict=True)]
        total_F = along_neurons("up_F", np.sum(rows, axis=0), np.asarray(slot.neurons) if slot.neurons else None)
        return np.sqrt(np.pad(total_F, (0, weights.down_DF.shape[1] - len(total_F))))


def layer_stats(profile: Profile, fingerprint: str, layers: int) -> list[LayerStats]:
    """Of every layer. Raises ProfileError when the profile is of another model or lacks a layer, InputError when it counted no tokens."""
    profile.check_model(fingerprint)
    if len(profile.layers) != layers:
        raise ProfileError(f"the profile has {len(profile.layers)} MoE layers, the model {layers}", fix="profile again")
    if not profile.tokens:
        raise InputError("the profile counted no tokens", fix="profile more text")
    counts = profile.arrays.get("counts_LE")
    if counts is not None and len(counts) < layers:
        _lacks(f"the profile's counts_LE ends before MoE layer {len(counts)}")
    if counts is not None and (empty := np.flatnonzero(counts.sum(1) == 0)).size:
        _lacks(f"the profile saw no token in MoE layer {empty[0]}")
    return [LayerStats(profile, ordinal) for ordinal in range(layers)]


def _lacks(found: str) -> NoReturn:
    raise ProfileError(found, expected="every layer", fix="profile again")
