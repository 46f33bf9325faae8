"""Sequences: each sequence's own counts, so that intervals can be had by drawing sequences anew.

Paper      none
Idea       Tokens of a text are not independent; an honest interval resamples whole sequences.
Rule       sequence_counts[s, l, e] = tokens of sequence s whose slots hold e
Needs      ids
Gives      sequence_counts_SLE (narrow integers), sequence_tokens_S, sequence_label_S (the label of most of its tokens plus one, 0 unread)
Departs    nothing
Checked    sums over sequences to the counts
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count


@method("profile.probes.sequences", kind="probe", fidelity="exact")
class Sequences:
    """Counts per sequence."""

    gives = ("sequence_counts_SLE", "sequence_tokens_S", "sequence_label_S")

    def start(self, setting: Setting) -> Statistics:
        narrow = np.uint8 if setting.longest < 2**8 else np.uint16 if setting.longest < 2**16 else np.uint32
        counts = Count(setting.sequences, setting.layers, setting.width, dtype=narrow)
        # Labels count from one here, so that a sequence not read yet is 0 and shards add up.
        return {
            "sequence_counts_SLE": counts,
            "sequence_tokens_S": Count(setting.sequences),
            "sequence_label_S": Count(setting.sequences),
        }

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        statistics["sequence_counts_SLE"].add((seen.index, layer.ordinal), layer.chosen_TE.sum(0))
        if layer.ordinal == 0:
            statistics["sequence_tokens_S"].add(seen.index, len(seen.tokens_T))
            statistics["sequence_label_S"].add(seen.index, np.bincount(seen.labels_T).argmax() + 1)
