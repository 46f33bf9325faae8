"""Counts: how often each expert is chosen.

Paper      none
Idea       The first thing to know of an expert is how much of the text it sees.
Rule       counts[l, e] = number of tokens whose slots hold e; empty[l] = empty slots
Needs      ids
Gives      counts_LE, empty_L
Departs    nothing
Checked    planted routing count for count; every token fills K slots
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count


@method("profile.probes.counts", kind="probe", fidelity="exact")
class Counts:
    """Tokens per expert."""

    gives = ("counts_LE", "empty_L")

    def start(self, setting: Setting) -> Statistics:
        return {"counts_LE": Count(setting.layers, setting.width), "empty_L": Count(setting.layers)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        flat = layer.experts_TK.reshape(-1)
        statistics["counts_LE"].add(layer.ordinal, np.bincount(flat[flat >= 0], minlength=layer.width))
        statistics["empty_L"].add(layer.ordinal, (flat < 0).sum())
