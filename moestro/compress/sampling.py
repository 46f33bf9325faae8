"""A layer on a few real inputs: what each expert answers, and what the layer gives when only some of them are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moestro.compress.slots import arrays_of
from moestro.compress.stats import LayerStats
from moestro.core.errors import ProfileError, UnsupportedModel
from moestro.core.experts import ExpertKey, ExpertSpec, ExpertWeights
from moestro.core.layer import LayerFacts
from moestro.kernels.ffn import activate
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.families.resize import router_tensors
from moestro.models.layout import Layout
from moestro.models.native.router import route
from moestro.models.parts import floats
from moestro.profile.profile import Profile


@dataclass(frozen=True, slots=True)
class LayerSample:
    """n sampled inputs of a layer. logits_nE, choice_E: the router's logits and the bias of its choice, if it has one; outputs_EnD: each
    expert's answer to every input. facts: of the layer with E experts."""

    facts: LayerFacts
    logits_nE: np.ndarray
    choice_E: np.ndarray | None
    outputs_EnD: np.ndarray

    @classmethod
    def read(cls, profile: Profile, checkpoint: Checkpoint, layout: Layout, ordinal: int, experts: Sequence[int]) -> LayerSample:
        """From a profile with the probe samples. Raises ProfileError, and UnsupportedModel for routers with arithmetic of their own."""
        facts = layout.facts.layers[ordinal]
        if facts.router.score not in ("softmax", "sigmoid", "logits") or facts.spec.weigh_input:
            raise UnsupportedModel(
                f"the router of this {layout.facts.family} cannot be tried with fewer experts outside the model",
                expected="softmax, sigmoid or logits", fix="use a criterion such as reap",
            )  # fmt: skip
        there = profile.need("samples", "sampled_N") > 0
        x_nD = LayerStats(profile, ordinal).need("samples", "input_samples_LND")[there].astype(np.float32)
        if not len(x_nD):
            raise ProfileError("the profile holds no sampled inputs", fix="profile more text with --probe samples")
        logits_nE, choice_E = _router(checkpoint, layout, ordinal, x_nD)
        outputs = [_answer(x_nD, read_expert(checkpoint, layout, ExpertKey(ordinal, e)), facts.spec) for e in experts]
        ids = list(experts)
        facts = replace(facts, num_experts=len(ids))
        return cls(facts, logits_nE[:, ids], None if choice_E is None else choice_E[ids], np.stack(outputs))

    def output(self, kept: Sequence[int]) -> np.ndarray:
        """y_nD: the routed sum when only these experts are there and the router chooses among them."""
        ids = np.asarray(kept)
        facts = replace(self.facts, num_experts=len(ids))
        choice_E = None if self.choice_E is None else self.choice_E[ids]
        ids_nK, weights_nK = route(np.ascontiguousarray(self.logits_nE[:, ids]), facts, choice_E)
        rows = np.arange(len(ids_nK))
        y_nD = np.zeros_like(self.outputs_EnD[0])
        for slot in range(ids_nK.shape[1]):
            y_nD += weights_nK[:, slot, None] * self.outputs_EnD[ids[ids_nK[:, slot]], rows]
        return y_nD

    def loss(self, kept: Sequence[int], whole_nD: np.ndarray) -> float:
        """|y - y'|^2 / |y|^2 over all samples, y = whole_nD."""
        return float(((whole_nD - self.output(kept)) ** 2).sum() / max(float((whole_nD**2).sum()), 1e-30))


def _router(checkpoint: Checkpoint, layout: Layout, ordinal: int, x_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    found = {}
    for name in router_tensors(checkpoint, layout, ordinal):
        array = floats(checkpoint.read(name), checkpoint.tensors[name].dtype).astype(np.float32)
        found["weight" if array.ndim == 2 and array.shape[0] > 1 else "bias" if name.endswith("router.bias") else "choice"] = (
            array
        )
    logits_nE = x_nD @ found["weight"].T
    if "bias" in found:
        logits_nE = logits_nE + found["bias"]
    choice = found.get("choice")
    return np.ascontiguousarray(logits_nE, np.float32), None if choice is None else choice.reshape(-1)


def _answer(x_nD: np.ndarray, weights: ExpertWeights, spec: ExpertSpec) -> np.ndarray:
    arrays = arrays_of(weights)
    up_nF = x_nD @ arrays["up_FD"].T + arrays.get("up_F", 0)
    gate_nF = x_nD @ arrays["gate_FD"].T + arrays.get("gate_F", 0) if "gate_FD" in arrays else None
    return activate(gate_nF, up_nF, spec.activation, spec.limit, spec.alpha) @ arrays["down_DF"].T + arrays.get("down_D", 0)
