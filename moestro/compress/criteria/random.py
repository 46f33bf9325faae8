"""Random: scores drawn by a seed, what any criterion has to beat.

Paper      none
Idea       A criterion that is no better than drawn lots is none.
Rule       score_e uniform in [0, 1), drawn for each layer from the seed
Needs      nothing of the profile but its layers
Gives      scores_E
Departs    nothing
Checked    the same seed gives the same scores; layers differ
"""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats
from moestro.core.method import method


@method("compress.criteria.random", kind="criterion", fidelity="exact")
def random(stats: LayerStats, *, seed: int = 0) -> np.ndarray:
    """float64 scores_E."""
    return np.random.default_rng([seed, stats.ordinal]).random(stats.facts["num_experts"])[stats.ids_E]
