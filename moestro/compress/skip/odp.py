"""MC-MoE's online dynamic pruning: half of the second experts are skipped, those whose weight is smallest beside the first.

Paper      Huang et al. 2024, arXiv 2410.06270 (ICLR 2025)
Idea       The ratio of a token's weights says whether it needs more than one expert; its median is a threshold of each layer's own.
Rule       mu_l = the `share` quantile of w_j / w_1 over all tokens and all chosen experts but the first; expert j is skipped at run time
           when w_j < mu_l w_1; the share `protect` of a pass's tokens with the largest |x|_1 keep all
Needs      ratios
Gives      the tap layers.taps.weight_ratio for each layer
Departs    for more than two experts per token the ratios of all but the first share one threshold; quantiles are in steps of 2^(1/32);
           the significance of a token is without the attention it gets, see the tap; every layer skips, where the authors' code can
           leave those out that lose most
Checked    share 0 skips nothing, 1 leaves the first alone; the share of skipped pairs is what was asked for; beats skipping at random
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moestro.compress.skipping import Skips, below, ratios, renormalised
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError
from moestro.core.layer import LayerFacts
from moestro.core.method import method
from moestro.core.plans.compression import TapUse
from moestro.profile.probes.ratios import PER_OCTAVE


@method("compress.skip.odp", kind="skip", paper="2410.06270", needs=("ratios",), fidelity="adapted")
def odp(stats: Sequence[LayerStats], layers: Sequence[LayerFacts], *, share: float = 0.5, protect: float = 0.02) -> Skips:
    """share: of the experts beyond each token's first that are skipped, about. Raises InputError, ProfileError."""
    if not 0 <= share <= 1:
        raise InputError(f"share is {share:g}", expected="0 to 1")
    made: Skips = []
    for mine, facts in zip(stats, layers, strict=True):
        ratios_KR = ratios(mine)
        threshold = quantile(ratios_KR.sum(0), share)
        settings = {"threshold": threshold, "protect": protect, "renormalise": renormalised(facts)}
        made.append((TapUse("layers.taps.weight_ratio", settings), below(ratios_KR, threshold)))
    return made


def quantile(counts_R: np.ndarray, share: float) -> float:
    """The ratio below which this share lies, rounded to the histogram's steps; 0 for an empty one."""
    if share >= 1:
        return 1.0
    if not counts_R.sum() or share <= 0:
        return 0.0
    below_R = np.cumsum(counts_R[::-1])[::-1] / counts_R.sum()  # from this step on: smaller ratios
    return float(2.0 ** (-int(np.argmin(np.abs(below_R - share))) / PER_OCTAVE))
