"""Intervals and nulls: Wilson's for a share of tokens, the basic bootstrap over whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Z95 = 1.959963984540054


def wilson(successes: Any, trials: Any, z: float = Z95) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of a share, by Wilson 1927; (0, 1) where there were no trials. It takes trials for independent."""
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    safe = np.where(n > 0, n, 1)
    share = k / safe
    middle = (share + z**2 / (2 * safe)) / (1 + z**2 / safe)
    half = z / (1 + z**2 / safe) * np.sqrt(share * (1 - share) / safe + z**2 / (4 * safe**2))
    return np.where(n > 0, np.maximum(0, middle - half), 0), np.where(n > 0, np.minimum(1, middle + half), 1)


def bootstrap(
    statistic: Callable[[np.ndarray], Any], sequences: int, *, draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Basic 95 % interval, 2 * estimate - quantile, of statistic(times_S) where times_S says how often each sequence is drawn.

    The drawn statistic may be an array; draws on which it is not a number are left out.
    """
    rng = np.random.default_rng(seed)
    estimate = np.asarray(statistic(np.ones(sequences)), np.float64)
    even_S = np.full(sequences, 1 / max(1, sequences))
    found = np.stack([np.asarray(statistic(rng.multinomial(sequences, even_S).astype(np.float64))) for _ in range(draws)])
    kept = found[np.isfinite(found.reshape(draws, -1)).all(1)]
    if not len(kept):
        return np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan)
    return 2 * estimate - np.quantile(kept, 0.975, axis=0), 2 * estimate - np.quantile(kept, 0.025, axis=0)
