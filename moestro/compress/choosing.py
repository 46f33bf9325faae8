"""From scores to the experts a layer keeps: as many of each router group, the protected ones first."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from moestro.core.errors import InputError
from moestro.core.layer import LayerFacts


def least(facts: LayerFacts) -> int:
    """The fewest experts that a layer's router can choose among."""
    groups = facts.router.groups
    each = max(-(-facts.top_k // facts.router.groups_kept), 2 if facts.router.selection_bias and groups > 1 else 1)
    return each * groups if groups > 1 else facts.top_k


def choose(scores_E: np.ndarray, keep: int, facts: LayerFacts, protected: Collection[int] = ()) -> list[int]:
    """Ids of the `keep` best, ascending, as many in each router group; ties go to the lower id.

    Raises InputError for scores that are no numbers, for a number that the groups do not divide, and for too many protected experts.
    """
    if not np.isfinite(scores_E).all():
        raise InputError(
            f"the scores of MoE layer {facts.ordinal} are not numbers", fix="profile more text, or use another criterion"
        )
    groups = facts.router.groups
    if keep % groups or len(scores_E) % groups:
        raise InputError(
            f"{keep} experts cannot be divided among {groups} groups",
            expected=f"a multiple of {groups}",
            fix=f"--keep {-(-keep // groups) * groups}",
        )
    size, kept = len(scores_E) // groups, []
    for g in range(groups):
        ids = range(g * size, (g + 1) * size)
        always = [e for e in ids if e in protected]
        if len(always) > keep // groups:
            raise InputError(
                f"{len(always)} protected experts in MoE layer {facts.ordinal} and {keep // groups} can be kept",
                fix="keep more, or give --no-protect",
            )
        rest = sorted((e for e in ids if e not in protected), key=lambda e: (-scores_E[e], e))
        kept += always + rest[: keep // groups - len(always)]
    return sorted(kept)
