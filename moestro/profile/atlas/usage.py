"""How often each label's tokens choose each expert, with both intervals: the numbers of every comparison of labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moestro.profile.intervals import bootstrap, wilson
from moestro.profile.profile import Profile

DRAWS = 500  # as the measure label_usage


@dataclass(frozen=True, slots=True)
class Usage:
    """share_GLE of the label's tokens; low, high: the wider of Wilson's interval and the bootstrap over the label's sequences.

    sequences_G: how many sequences the bootstrap drew from; with fewer than two there is Wilson's interval alone.
    """

    share_GLE: np.ndarray
    low_GLE: np.ndarray
    high_GLE: np.ndarray
    sequences_G: tuple[int, ...]


def usage(profile: Profile, *, draws: int = DRAWS, seed: int = 0) -> Usage:
    """Needs the probe usage; with sequences also the bootstrap. Raises ProfileError without usage."""
    usage_GLE = profile.need("usage", "usage_GLE")
    tokens_G = np.array(profile.tokens_G, np.float64)[:, None, None]
    low_GLE, high_GLE = wilson(usage_GLE, np.broadcast_to(tokens_G, usage_GLE.shape))
    sequences = [0] * len(profile.labels)
    if all(name in profile.arrays for name in ("sequence_counts_SLE", "sequence_label_S", "sequence_tokens_S")):
        counts_SLE, length_S = profile.arrays["sequence_counts_SLE"], profile.arrays["sequence_tokens_S"]
        for g in range(len(profile.labels)):
            own = profile.arrays["sequence_label_S"] - 1 == g
            sequences[g] = int(own.sum())
            if sequences[g] < 2:
                continue
            for layer in range(len(profile.layers)):
                counts_SE, lengths = counts_SLE[own, layer].astype(np.float64), length_S[own]
                drawn = bootstrap(lambda t_S, c=counts_SE, n=lengths: (t_S @ c) / (t_S @ n), sequences[g], draws=draws, seed=seed)
                low_GLE[g, layer] = np.fmin(low_GLE[g, layer], np.maximum(0, drawn[0]))
                high_GLE[g, layer] = np.fmax(high_GLE[g, layer], np.minimum(1, drawn[1]))
    share_GLE = usage_GLE / np.maximum(1, tokens_G)
    return Usage(share_GLE, low_GLE, high_GLE, tuple(sequences))
