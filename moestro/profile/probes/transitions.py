"""Transitions: from an expert of one MoE layer to those of the next, for the same token.

Paper      Yao et al. 2024, arXiv 2401.08383 (ExFlow), for top-1 routing
Idea       Where tokens of an expert go next is far from even, which placement and prefetching can use.
Rule       next[l, i, j] = tokens with i among the experts of layer l and j among those of layer l + 1; next_first: heaviest only
Needs      ids; weights for the heaviest
Gives      next_LEE and next_first_LEE, with one layer less
Departs    with several slots all pairs are counted beside the heaviest; the paper's models have one slot
Checked    a permutation router gives a permutation of the counts; equal to the trace's own count
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count


@method("profile.probes.transitions", kind="probe", fidelity="faithful", paper="2401.08383")
class Transitions:
    """Pairs of experts of neighbouring MoE layers."""

    gives = ("next_LEE", "next_first_LEE")

    def start(self, setting: Setting) -> Statistics:
        shape = (max(0, setting.layers - 1), setting.width, setting.width)
        return {"next_LEE": Count(*shape), "next_first_LEE": Count(*shape)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        if layer.ordinal == 0:
            return
        before = seen.layers[layer.ordinal - 1]
        statistics["next_LEE"].add(layer.ordinal - 1, before.chosen_TE.T @ layer.chosen_TE)
        first_T, second_T = before.ranked_TK[:, 0], layer.ranked_TK[:, 0]
        both = (first_T >= 0) & (second_T >= 0)
        pairs = np.bincount(first_T[both] * layer.width + second_T[both], minlength=layer.width**2)
        statistics["next_first_LEE"].add(layer.ordinal - 1, pairs.reshape(layer.width, layer.width))
