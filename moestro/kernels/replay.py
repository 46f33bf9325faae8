"""Replays of recorded routing natively, every budget of a policy at once.

The reference is the engine's slot table with its policy objects; without native code the engine replays with those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moestro.kernels import native

POLICIES = ("lru", "lfu", "belady", "arc")
ONE_PASS = ("lru", "lfu", "belady")  # all budgets together
MOST_KEYS = 1 << 16
EXACT = 1 << 53  # scores are doubles


@dataclass(frozen=True, slots=True)
class Asked:
    """Every demand of a trace. Demand p * L + l is of pass p and layer l; its keys are key_N[start_D1[d] : start_D1[d + 1]].

    key_N: uint16, experts of all layers numbered through. prefill_P: uint8, per pass. first_L1: number of a layer's first expert.
    """

    key_N: np.ndarray
    start_D1: np.ndarray
    prefill_P: np.ndarray
    first_L1: np.ndarray


def asked(experts_LTK: np.ndarray, starts_P1: np.ndarray, prefill_P: np.ndarray, num_experts: Sequence[int]) -> Asked | None:
    """The demands of passes over tokens starts_P1[p] to starts_P1[p + 1]: within one the most wanted expert first, ties to the lower.

    experts_LTK: int8 or int16, each below its layer's number of experts, negative in empty slots. None without native code, and
    for more than 65 536 experts.
    """
    module = native.extension()
    if not hasattr(module, "list_demands") or sum(num_experts) > MOST_KEYS:  # none, or built before it could replay
        return None
    first_L1 = np.concatenate([[0], np.cumsum(num_experts)]).astype(np.int64)
    experts_LTK = np.ascontiguousarray(experts_LTK)
    key_N = np.empty(experts_LTK.size, np.uint16)
    start_D1 = np.zeros((len(starts_P1) - 1) * len(num_experts) + 1, np.int64)
    used = module.list_demands(experts_LTK, np.ascontiguousarray(starts_P1, np.int64), first_L1, key_N, start_D1)
    return Asked(key_N[:used], start_D1, np.ascontiguousarray(prefill_P, np.uint8), first_L1)


def count(asked: Asked, policy: str, slots: Sequence[int], layer: int | None = None) -> np.ndarray | None:
    """int64 [budgets, decode | prefill, L, demands | misses | evictions]: what a cache of each of `slots` does.

    slots: ascending, at least 1. layer: count this layer's demands alone, in slots of its own; by default one pool serves all.
    None for a trace so long that scores would not be exact. Gives up the interpreter lock.
    """
    module = native.extension()
    assert module is not None, "there are demands only with native code"
    passes, keys = len(asked.prefill_P), len(asked.key_N) + 1
    if max(passes * keys, len(asked.start_D1) * int(asked.first_L1[-1])) + keys >= EXACT:
        return None
    tally = np.zeros((len(slots), 2, len(asked.first_L1) - 1, 3), np.int64)
    sizes = np.array(slots, np.int64)
    module.count_replay(
        asked.key_N,
        asked.start_D1,
        asked.prefill_P,
        asked.first_L1,
        POLICIES.index(policy),
        -1 if layer is None else layer,
        sizes,
        tally,
    )
    return tally
