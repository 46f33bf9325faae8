"""Norms: how large the experts' outputs are, alone and with their gate.

Paper      Lasby et al. 2025, arXiv 2510.13999 (REAP) reads them; others do too
Idea       What an expert adds to the residual stream is its output times its weight; neither alone says how much it matters.
Rule       norm[l, e] = sum over its tokens of |E_e(x)|; gated_norm = sum of g |E_e(x)|; norm_squares, gated_squares likewise squared
Needs      inputs and experts; ids and weights
Gives      norm_LE, gated_norm_LE, norm_squares_LE, gated_squares_LE, worked_LE (tokens)
Departs    nothing
Checked    against the layer's own experts token by token; scaling an expert's output scales its norms
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.norms", kind="probe", fidelity="exact", needs=("inputs", "experts"))
class Norms:
    """Sums of L2 norms of unweighted outputs, and times the combine weight."""

    gives = ("norm_LE", "gated_norm_LE", "norm_squares_LE", "gated_squares_LE", "worked_LE")

    def start(self, setting: Setting) -> Statistics:
        shape = (setting.layers, setting.width)
        return {**{name: Sum(*shape) for name in self.gives[:-1]}, "worked_LE": Count(*shape)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        for work in layer.work():
            at = (layer.ordinal, work.expert)
            norm_n = lengths(work.output_nD)
            gated_n = norm_n if layer.facts.spec.weigh_input else norm_n * np.abs(work.weights_n)
            for name, value_n in zip(self.gives, (norm_n, gated_n, norm_n**2, gated_n**2), strict=False):
                statistics[name].add(at, value_n.sum())
            statistics["worked_LE"].add(at, len(norm_n))


def lengths(rows_nD: np.ndarray) -> np.ndarray:
    """float64 L2 norm of each row."""
    return np.sqrt(np.einsum("nd,nd->n", rows_nD, rows_nD, dtype=np.float64))
