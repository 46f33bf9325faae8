"""Samples: what goes into each layer's experts, on a few tokens of each sequence.

Paper      none; used by searches that try sets of experts (arXiv 2402.14800)
Idea       To know what a layer would have computed with other experts one needs its inputs, and a few hundred of them are enough.
Rule       input_samples[l, s * tokens + j] = x of the j-th of `tokens` evenly spaced tokens of sequence s; zeros where a sequence is shorter
Needs      inputs
Gives      input_samples_LND, sampled_N (1 where there is a sample)
Departs    nothing; values are rounded to multiples of 2**-34
Checked    against the runner's inputs; independent of the order of shards
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.samples", kind="probe", fidelity="exact", needs=("inputs",))
class Samples:
    """Inputs of the experts. tokens: how many of each sequence; they take 16 L S tokens D bytes for S sequences."""

    gives = ("input_samples_LND", "sampled_N")

    def __init__(self, *, tokens: int = 8) -> None:
        if tokens < 1:
            raise InputError(f"tokens is {tokens}", expected="at least 1")
        self.tokens = tokens

    def start(self, setting: Setting) -> Statistics:
        rows = setting.sequences * self.tokens
        return {"input_samples_LND": Sum(setting.layers, rows, setting.d_model), "sampled_N": Count(rows)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        total = len(layer.x_TD)
        if not total:
            return
        chosen = np.unique(np.linspace(0, total - 1, min(self.tokens, total)).astype(int))
        rows = slice(seen.index * self.tokens, seen.index * self.tokens + len(chosen))
        statistics["input_samples_LND"].add((layer.ordinal, rows), layer.x_TD[chosen])
        if layer.ordinal == 0:
            statistics["sampled_N"].add(rows, np.ones(len(chosen)))
