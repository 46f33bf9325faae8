"""Weight ratio: one threshold for all layers, without statistics.

Paper      none; the rule of arXiv 2410.06270 with a constant
Idea       What MC-MoE calibrates can also be set by hand, and is then the same on every text.
Rule       expert j of a token is skipped at run time when w_j < threshold * w_1
Needs      nothing
Gives      the tap layers.taps.weight_ratio for each layer
Departs    nothing
Checked    threshold 0 skips nothing, 1 leaves the first alone
"""

from __future__ import annotations

from collections.abc import Sequence

from moestro.compress.skipping import Skips, renormalised
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError
from moestro.core.layer import LayerFacts
from moestro.core.method import method
from moestro.core.plans.compression import TapUse


@method("compress.skip.ratio", kind="skip", fidelity="exact")
def ratio(stats: Sequence[LayerStats], layers: Sequence[LayerFacts], *, threshold: float = 0.3, protect: float = 0.0) -> Skips:
    """protect: share of a pass's tokens that keep all their experts. Raises InputError."""
    if not 0 <= threshold <= 1 or not 0 <= protect <= 1:
        raise InputError(f"threshold {threshold:g}, protect {protect:g}", expected="shares from 0 to 1")
    settings = {"threshold": threshold, "protect": protect}
    return [(TapUse("layers.taps.weight_ratio", {**settings, "renormalise": renormalised(facts)}), None) for facts in layers]
