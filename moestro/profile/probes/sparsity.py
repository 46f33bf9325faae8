"""Sparsity: which share of the active experts' neurons could be skipped at which error of their output.

Paper      Luo et al. 2024, arXiv 2411.02335 (Sparsing Law)
Idea       A neuron that adds little to the output can be skipped; how many can be depends on the error that is allowed.
Rule       Neuron i adds s_i W_down[:, i] of norm n_i = |s_i| |W_down[:, i]|. For thresholds t of a grid: tail(t) = sum over tokens of
           |sum of what neurons with n_i < t add| / |E(x)|, kept(t) = neurons with n_i >= t. CETT(t) = tail(t) / tokens
Needs      inputs and experts
Gives      tail_LQ (sums), kept_LQ, thresholds_Q, tested_L (pairs of token and expert), neurons_L (pairs of neuron and token)
Departs    CETT is taken per routed expert and averaged over (token, expert) pairs, as experts stand in the place of a dense layer's FFN;
           thresholds are a fixed geometric grid instead of a search per layer; 'output' leaves out biases
Checked    t = 0 keeps every neuron with no error; kept never grows and CETT never falls much with t; a ReLU expert's zeros are free
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.probes.norms import lengths
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Same, Sum


@method("profile.probes.sparsity", kind="probe", fidelity="adapted", paper="2411.02335", needs=("inputs", "experts"))
class Sparsity:
    """Error and kept neurons at each threshold. low, high: of the grid, as powers of two; steps: how many; 0 is always the first."""

    gives = ("tail_LQ", "kept_LQ", "thresholds_Q", "tested_L", "neurons_L")

    def __init__(self, *, low: int = -20, high: int = 4, steps: int = 25) -> None:
        if steps < 2 or low >= high:
            raise InputError(f"{steps} thresholds from 2^{low} to 2^{high}", expected="at least two, ascending")
        self.low, self.high, self.steps = low, high, steps
        self._grid_Q = np.concatenate([[0.0], 2.0 ** np.linspace(low, high, steps)])

    def start(self, setting: Setting) -> Statistics:
        la, q = setting.layers, self.steps + 1
        counts = {"kept_LQ": Count(la, q), "tested_L": Count(la), "neurons_L": Count(la)}
        return {**counts, "tail_LQ": Sum(la, q), "thresholds_Q": Same(self._grid_Q)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        tail_Q, kept_Q = np.zeros(len(self._grid_Q)), np.zeros(len(self._grid_Q), np.int64)
        for work in layer.work():
            down_DF = np.asarray(layer.weights(work.expert).down_DF, np.float32)
            size_nF = np.abs(work.hidden_nF) * lengths(down_DF.T)
            whole_n = lengths(work.hidden_nF @ down_DF.T)
            whole_n = np.where(whole_n > 0, whole_n, 1)
            for q, threshold in enumerate(self._grid_Q):
                small_nF = size_nF < threshold
                kept_Q[q] += small_nF.size - small_nF.sum()
                if small_nF.any():
                    tail_Q[q] += (lengths((work.hidden_nF * small_nF) @ down_DF.T) / whole_n).sum()
            statistics["tested_L"].add(layer.ordinal, len(size_nF))
            statistics["neurons_L"].add(layer.ordinal, size_nF.size)
        statistics["tail_LQ"].add(layer.ordinal, tail_Q)
        statistics["kept_LQ"].add(layer.ordinal, kept_Q)
