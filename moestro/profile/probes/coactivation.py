"""Co-activation: which experts of a layer are chosen together.

Paper      none
Idea       Experts that answer together can be placed, merged or cached together.
Rule       together[l, i, j] = tokens whose slots hold both i and j; the diagonal is the counts
Needs      ids
Gives      together_LEE
Departs    nothing
Checked    symmetric, diagonal equal to the counts, rows sum to K times the counts when no slot is empty
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count


@method("profile.probes.coactivation", kind="probe", fidelity="exact")
class Coactivation:
    """Pairs of experts within a token."""

    gives = ("together_LEE",)

    def start(self, setting: Setting) -> Statistics:
        return {"together_LEE": Count(setting.layers, setting.width, setting.width)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        statistics["together_LEE"].add(layer.ordinal, layer.chosen_TE.T @ layer.chosen_TE)
