"""Output similarity: the most used experts lead groups, the others join the leader that answers most like them.

Paper      Li et al. 2023, arXiv 2310.01334 (its ablation: similarity of expert outputs)
Idea       What counts for merging is what experts compute, not when they are asked.
Rule       leaders = the `groups` experts chosen most often; S_ij = mean over the same tokens of cos(E_i(x), E_j(x)); e joins argmax S_e,leader
Needs      counts, similarity
Gives      labels_E and S_EE
Departs    the paper names this ablation and not its formula: the mean over tokens of the cosine is inferred
Checked    every group holds its leader; planted duplicates join each other
"""

from __future__ import annotations

import numpy as np

from moestro.compress.group.alike import by_outputs, joined
from moestro.compress.merging import Grouping
from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.group.output_similarity", kind="group", paper="2310.01334", needs=("counts", "similarity"), fidelity="adapted")
def output_similarity(stats: LayerStats, groups: int) -> Grouping:
    """groups: from 1 to E."""
    alike_EE = by_outputs(stats)
    leaders = np.argsort(-stats.counts(), kind="stable")[:groups]
    return Grouping(joined(alike_EE, leaders), alike_EE)
