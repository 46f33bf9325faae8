"""UNCURL: experts whose router logits rise and fall together on a task become one.

Paper      Huang et al. 2024, arXiv 2409.01483
Idea       Pre-train with many experts, then reduce them for each task by what the router does on the task's text.
Rule       clusters of experts by the cosine of their columns of router logits on the task, one for each expert that stays
Needs      counts, alikeness
Gives      labels_E and the cosines
Departs    only the abstract's outline is public: clustering and its linkage are inferred; fuse.dominant gives pruning, fuse.frequency merging
Checked    one group per expert is the identity; planted duplicates join each other; all groups are used
"""

from __future__ import annotations

from moestro.compress.group.alike import by_logits, clustered
from moestro.compress.merging import Grouping
from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.group.uncurl", kind="group", paper="2409.01483", needs=("counts", "alikeness"), fidelity="adapted")
def uncurl(stats: LayerStats, groups: int) -> Grouping:
    """groups: from 1 to E."""
    alike_EE = by_logits(stats)
    return Grouping(clustered(alike_EE, groups, "average"), alike_EE)
