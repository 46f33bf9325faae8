"""Hierarchical clustering: experts that answer alike are joined two by two until as many groups as wanted are left.

Paper      Chen et al. 2024, arXiv 2410.08589 (HC-SMoE)
Idea       Clusters by output find duplicates wherever they are, and do not depend on who happens to be used most.
Rule       agglomerative clustering of experts with the distance 1 - mean cos(E_i(x), E_j(x)) over the same tokens, `linkage` between groups
Needs      counts, similarity
Gives      labels_E and the cosines
Departs    the paper measures Euclidean distance between mean outputs; the mean cosine over tokens ignores an expert's scale and does not
           let different outputs cancel in the mean
Checked    planted duplicates are found whatever their use; all groups are used
"""

from __future__ import annotations

from moestro.compress.group.alike import by_outputs, clustered
from moestro.compress.merging import Grouping
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.group.hierarchical", kind="group", paper="2410.08589", needs=("counts", "similarity"), fidelity="adapted")
def hierarchical(stats: LayerStats, groups: int, *, linkage: str = "average") -> Grouping:
    """groups: from 1 to E. linkage: average, complete or single."""
    if linkage not in ("average", "complete", "single"):
        raise InputError(f"the linkage is {linkage!r}", expected="average, complete or single")
    alike_EE = by_outputs(stats)
    return Grouping(clustered(alike_EE, groups, linkage), alike_EE)
