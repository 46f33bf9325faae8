"""Neurons: how often and how strongly each neuron of each expert is active.

Paper      Pei et al. 2025, arXiv 2502.04416 (CMoE) for the rates by rank
Idea       Neurons that are always among the strongest belong to everyone; those that fire together belong together.
Rule       active[l, e, f] = tokens on which |h_f| is among the `strongest` share of the expert's neurons; fired = tokens with h_f not 0;
           strength = sum of |h_f|
Needs      inputs and experts
Gives      active_LEF, fired_LEF, strength_LEF, neuron_tokens_LE
Departs    CMoE counts a fixed number of neurons of a dense layer with normalised weights; here it is a share of an expert's, as they are
Checked    active sums to its share of neurons per token; a ReLU expert fires where its pre-activation is positive
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.neurons", kind="probe", fidelity="adapted", paper="2502.04416", needs=("inputs", "experts"))
class Neurons:
    """Counts per neuron. strongest: the share of an expert's neurons that count as active on a token."""

    gives = ("active_LEF", "fired_LEF", "strength_LEF", "neuron_tokens_LE")

    def __init__(self, *, strongest: float = 0.1) -> None:
        if not 0 < strongest <= 1:
            raise InputError(f"strongest is {strongest}", expected="above 0, at most 1")
        self.strongest = strongest

    def start(self, setting: Setting) -> Statistics:
        shape = (setting.layers, setting.width, setting.d_expert)
        counts = {"active_LEF": Count(*shape), "fired_LEF": Count(*shape), "neuron_tokens_LE": Count(*shape[:2])}
        return {**counts, "strength_LEF": Sum(*shape)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        for work in layer.work():
            size_nF = np.abs(work.hidden_nF)
            neurons = size_nF.shape[1]
            kept = max(1, round(self.strongest * neurons))
            at = (layer.ordinal, work.expert, slice(neurons))
            top_nK = np.argpartition(-size_nF, kept - 1, axis=1)[:, :kept]
            statistics["active_LEF"].add(at, np.bincount(top_nK.reshape(-1), minlength=neurons))
            statistics["fired_LEF"].add(at, (size_nF > 0).sum(0))
            statistics["strength_LEF"].add(at, size_nF.sum(0, dtype=np.float64))
            statistics["neuron_tokens_LE"].add(at[:2], len(size_nF))
