"""M-SMoE: the most used experts lead groups, the others join the leader that the router likes on the same tokens.

Paper      Li et al. 2023, arXiv 2310.01334
Idea       The router's policy says both which experts carry the work and which are of one kind.
Rule       leaders = the `groups` experts chosen most often; S_ij = (cos(z_:i, z_:j) + 1) / 2 over the router's logits; e joins argmax S_e,leader
Needs      counts, alikeness
Gives      labels_E and S_EE
Departs    nothing here; the number of leaders per layer is the budget's (threshold for the paper's), fusing is fuse.frequency with
           alignment. By default a group keeps its leader's row of the router, as files then get smaller; the paper's is --router repoint
Checked    every group holds its leader; leaders are the most used; planted duplicates join each other
"""

from __future__ import annotations

import numpy as np

from moestro.compress.group.alike import by_logits, joined
from moestro.compress.merging import Grouping
from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.group.m_smoe", kind="group", paper="2310.01334", needs=("counts", "alikeness"), fidelity="faithful")
def m_smoe(stats: LayerStats, groups: int) -> Grouping:
    """groups: from 1 to E."""
    alike_EE = (by_logits(stats) + 1) / 2
    leaders = np.argsort(-stats.counts(), kind="stable")[:groups]
    return Grouping(joined(alike_EE, leaders), alike_EE)
