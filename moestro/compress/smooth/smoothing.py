"""What a method of kind 'smooth' decides, and the tensors that its decision touches.

Shapes: D model width, F expert width, n kept tokens of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moestro.core.errors import UnsupportedModel
from moestro.core.experts import ExpertWeights
from moestro.models.checkpoint import Checkpoint
from moestro.models.layout import Layout
from moestro.models.native import describe, native_supported


@dataclass(frozen=True, slots=True)
class Smoothing:
    """Of one layer. scale_D: the layer's inputs are divided by it, and everything they are multiplied with is multiplied by it.

    hidden_SF: of each slot, what its hidden units are divided by; rows of `up` shrink, columns of `down` grow (1 where `up` has a bias). rows: of each slot, the
    kept tokens that calibrated methods fit it to.
    """

    scale_D: np.ndarray
    hidden_SF: tuple[np.ndarray, ...]
    rows: tuple[np.ndarray, ...]

    def applied(self, slot: int, weights: ExpertWeights) -> ExpertWeights:
        """A slot's weights in the new scales: on inputs divided by scale_D they compute the same."""
        hidden_F = self.hidden_SF[slot]
        gate_FD = None if weights.gate_FD is None else weights.gate_FD * self.scale_D
        up_FD = weights.up_FD * self.scale_D / hidden_F[:, None]
        return replace(weights, gate_FD=gate_FD, up_FD=up_FD, down_DF=weights.down_DF * hidden_F)


def touched(checkpoint: Checkpoint, layout: Layout) -> dict[str, tuple[int, bool]]:
    """Trunk tensors that a smoothing changes: name -> (ordinal of the layer, whether it is divided: the norm before the experts).

    The others, which the same norm feeds, are multiplied: router, shared experts and their gate.
    Raises UnsupportedModel for a family without a native trunk, which would say what each norm feeds.
    """
    if (why := native_supported(checkpoint, layout)) is not None:
        raise UnsupportedModel(
            f"it is not known what else reads the inputs of this {layout.facts.family}'s experts: {why}",
            expected="a family that the native trunk runs",
            fix="plan without --smooth",
        )
    decoder, out = describe(checkpoint, layout), {}
    for la in layout.facts.layers:
        layer = decoder.layers[la.index]
        assert layer.router is not None, "a layer with experts has a router"
        linears = [layer.router.linear, layer.mlp_gate, *((layer.mlp.gate, layer.mlp.up) if layer.mlp is not None else ())]
        out |= {linear.weight: (la.ordinal, False) for linear in linears if linear is not None}
        out[layer.post_norm] = la.ordinal, True
    return out
