"""Usage by label: how often, and with how much weight, each expert is chosen in each kind of text.

Paper      none
Idea       An expert belongs to a domain, language or task if it is used there more than elsewhere.
Rule       usage[g, l, e] = tokens of label g whose slots hold e; usage_mass[g, l, e] = sum of their weights
Needs      ids, weights and labelled data
Gives      usage_GLE, usage_mass_GLE
Departs    nothing
Checked    sums over labels to the counts; planted domains use their own experts only
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.usage", kind="probe", fidelity="exact")
class Usage:
    """Counts and mass per label."""

    gives = ("usage_GLE", "usage_mass_GLE")

    def start(self, setting: Setting) -> Statistics:
        shape = (len(setting.labels), setting.layers, setting.width)
        return {"usage_GLE": Count(*shape), "usage_mass_GLE": Sum(*shape)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        for label, of_it_T in seen.labelled().items():
            statistics["usage_GLE"].add((label, layer.ordinal), layer.chosen_TE[of_it_T].sum(0))
            statistics["usage_mass_GLE"].add((label, layer.ordinal), layer.gates_TE[of_it_T].sum(0))
