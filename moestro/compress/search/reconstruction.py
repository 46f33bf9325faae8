"""Reconstruction search: keep the experts with which the layer's output on real inputs changes least.

Paper      Lu et al. 2024, arXiv 2402.14800
Idea       What a layer gives with fewer experts can simply be computed, routing included, for every set of experts that could stay.
Rule       argmin over S, |S| = keep, of |y - y_S|^2 / |y|^2 on sampled inputs, y_S with the router choosing among S. All sets when there are
           no more than `most`; else one expert after another leaves, each time the one whose leaving costs least
Needs      samples
Gives      experts kept and the loss
Departs    the greedy search is ours: the paper tries all sets, which ends at about 16 experts
Checked    the exhaustive search's loss is the least of all sets; greedy never leaves a protected one; idle and duplicated experts go first
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import combinations

from moestro.compress.choosing import least
from moestro.compress.sampling import LayerSample
from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.search.reconstruction", kind="search", paper="2402.14800", needs=("samples", "counts"), fidelity="adapted")
def reconstruction(
    sample: LayerSample, keep: int, *, protected: Collection[int] = (), most: int = 500
) -> tuple[list[int], float]:
    """(ids kept, ascending; loss). protected: ids that stay. most: sets tried at most. Raises InputError for routers with groups."""
    facts = sample.facts
    if facts.router.groups > 1:
        raise InputError("the search does not know how to keep groups of experts even", fix="use a criterion such as reap")
    if not max(least(facts), len(protected)) <= keep <= facts.num_experts:
        raise InputError(
            f"{keep} experts are to be kept in MoE layer {facts.ordinal}",
            expected=f"{max(least(facts), len(protected))} to {facts.num_experts}",
        )
    whole_nD = sample.output(range(facts.num_experts))
    free = [e for e in range(facts.num_experts) if e not in protected]
    away = facts.num_experts - keep
    if math.comb(len(free), away) <= most:
        sets = [sorted(set(range(facts.num_experts)) - set(gone)) for gone in combinations(free, away)]
        losses = [sample.loss(kept, whole_nD) for kept in sets]
        best = losses.index(min(losses))
        return sets[best], losses[best]
    kept, loss = list(range(facts.num_experts)), 0.0
    for _ in range(away):
        tries = [(sample.loss([k for k in kept if k != e], whole_nD), e) for e in kept if e not in protected]
        loss, gone = min(tries)
        kept.remove(gone)
    return kept, loss
