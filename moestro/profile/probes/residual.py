"""Residual similarity: how much a layer's routed experts turn the residual stream.

Paper      the token weight of EASY-EP, arXiv 2504.06792
Idea       A token whose stream hardly turns was hardly served by its experts.
Rule       c(t) = cos(r_t, r_t + y_t), r the stream before the layer, y the routed experts' sum; similarity = sum of c, turned = sum of
           max(0, 1 - c); stream_norm and output_norm = sums of |r| and |y|
Needs      inputs and residual
Gives      similarity_L, turned_L, stream_norm_L, output_norm_L, turning_L (tokens)
Departs    in a model that scales its residual branches the scale is not applied to y
Checked    y = 0 gives 1, y = -2 r gives -1; numpy on what transformers' modules pass on
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.probes.norms import lengths
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.residual", kind="probe", fidelity="adapted", paper="2504.06792", needs=("inputs", "residual"))
class Residual:
    """Sums over tokens of the cosine before and after the routed experts."""

    gives = ("similarity_L", "turned_L", "stream_norm_L", "output_norm_L", "turning_L")

    def start(self, setting: Setting) -> Statistics:
        return {**{name: Sum(setting.layers) for name in self.gives[:-1]}, "turning_L": Count(setting.layers)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        cosine_T = turning(layer)
        values = (cosine_T, np.maximum(0, 1 - cosine_T), lengths(layer.residual_TD), lengths(layer.y_TD))
        for name, value_T in zip(self.gives, values, strict=False):
            statistics[name].add(layer.ordinal, value_T.sum())
        statistics["turning_L"].add(layer.ordinal, len(cosine_T))


def turning(layer: SeenLayer) -> np.ndarray:
    """float64 cosine of each token's residual stream before and after the routed experts; 1 where one of them is 0."""
    before_TD = layer.residual_TD.astype(np.float64)
    after_TD = before_TD + layer.y_TD
    scale_T = lengths(before_TD) * lengths(after_TD)
    return np.where(scale_T > 0, np.einsum("td,td->t", before_TD, after_TD) / np.where(scale_T > 0, scale_T, 1), 1)
