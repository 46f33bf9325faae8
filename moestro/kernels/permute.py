"""Routed pairs sorted by expert, stable in token then slot order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moestro.kernels import native


class Sorted(NamedTuple):
    """token_N, slot_N, expert_N: int64; weight_N: float32; starts_E1: int64, expert e owns starts_E1[e]:starts_E1[e+1]."""

    token_N: np.ndarray
    slot_N: np.ndarray
    expert_N: np.ndarray
    weight_N: np.ndarray
    starts_E1: np.ndarray


def sort_pairs(experts_TK: np.ndarray, weights_TK: np.ndarray, num_experts: int) -> Sorted:
    """The non-empty slots (id >= 0) grouped by expert.

    Raises:
        ValueError: an id of `num_experts` or more.
    """
    experts_TK = np.ascontiguousarray(experts_TK, np.int64)
    weights_TK = np.ascontiguousarray(weights_TK, np.float32)
    module = native.extension()
    if module is None:
        return reference_sort_pairs(experts_TK, weights_TK, num_experts)
    room = experts_TK.size
    three, weight_N, starts_E1 = np.empty((3, room), np.int64), np.empty(room, np.float32), np.empty(num_experts + 1, np.int64)
    token_N, slot_N, expert_N = three
    pairs = module.sort_pairs(experts_TK, weights_TK, token_N, slot_N, expert_N, weight_N, starts_E1)
    return Sorted(token_N[:pairs], slot_N[:pairs], expert_N[:pairs], weight_N[:pairs], starts_E1)


def reference_sort_pairs(experts_TK: np.ndarray, weights_TK: np.ndarray, num_experts: int) -> Sorted:
    """`sort_pairs` in numpy."""
    assert experts_TK.shape == weights_TK.shape
    if experts_TK.size and int(experts_TK.max()) >= num_experts:
        raise ValueError(f"expert {int(experts_TK.max())} was routed to, but there are {num_experts}")
    flat = experts_TK.reshape(-1)
    kept = np.flatnonzero(flat >= 0)
    kept = kept[np.argsort(flat[kept], kind="stable")]
    starts_E1 = np.zeros(num_experts + 1, np.int64)
    starts_E1[1:] = np.cumsum(np.bincount(flat[kept], minlength=num_experts))
    slots = max(experts_TK.shape[1], 1)
    return Sorted(kept // slots, kept % slots, flat[kept], weights_TK.reshape(-1)[kept], starts_E1)
