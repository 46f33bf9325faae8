"""Inputs: a sample of what goes into each layer's router and experts, and where it was routed.

Paper      none; what GPTQ (arXiv 2210.17323), MC-MoE (arXiv 2410.06270) and EAQuant (arXiv 2506.13329) calibrate on
Idea       A few thousand tokens tell what every matrix of a layer is multiplied with, whatever is asked of them later, and take less room
           than second moments of each expert.
Rule       kept_x[l, n] = x of the n-th kept token in layer l, in float16; every token whose number in the data, counted in places of the
           longest sequence, is a multiple of a stride is kept, the stride as small as `most` allows; a kept row without a token is empty
Needs      inputs
Gives      kept_x_LND (bit patterns of float16), kept_experts_LNK (expert id + 1, 0 for an empty slot), kept_weights_LNK (float16 bits)
Departs    nothing
Checked    the rows are those of the model's own pass; rows of tokens that were not kept are empty
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count

_LARGEST = 65504.0


@method("profile.probes.inputs", kind="probe", fidelity="exact", needs=("inputs",))
class Inputs:
    """most: tokens that are kept, which take 2 L D bytes each."""

    gives = ("kept_x_LND", "kept_experts_LNK", "kept_weights_LNK")

    def __init__(self, *, most: int = 4096) -> None:
        self.most = most
        self._longest = self._stride = 1

    def start(self, setting: Setting) -> Statistics:
        places = setting.sequences * setting.longest
        self._longest, self._stride = setting.longest, max(1, -(-places // max(1, self.most)))
        shape = setting.layers, -(-places // self._stride)
        return {
            "kept_x_LND": Count(*shape, setting.d_model, dtype=np.uint16),
            "kept_experts_LNK": Count(*shape, setting.slots, dtype=np.uint16),
            "kept_weights_LNK": Count(*shape, setting.slots, dtype=np.uint16),
        }

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        place_T = seen.index * self._longest + np.flatnonzero(seen.counted)
        kept_T = np.flatnonzero(place_T % self._stride == 0)
        at = (layer.ordinal, place_T[kept_T] // self._stride)
        slots = (*at, slice(layer.experts_TK.shape[1]))
        statistics["kept_x_LND"].add(at, _half(layer.x_TD[kept_T]))
        statistics["kept_experts_LNK"].add(slots, layer.experts_TK[kept_T] + 1)
        statistics["kept_weights_LNK"].add(slots, _half(layer.weights_TK[kept_T]))


def _half(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16).view(np.uint16)
