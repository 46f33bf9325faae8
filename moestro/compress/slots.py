"""The arithmetic of a plan: from old experts to a slot's weights, and from old rows of a router to new ones. float32 numpy throughout,
in the order that the plan gives, so that a file and a live model come out with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np

from moestro.core.experts import ExpertWeights
from moestro.core.plans.compression import Row, Slot

ROWS, COLUMNS = ("gate_FD", "up_FD", "gate_F", "up_F"), ("down_DF",)


def build(slot: Slot, read: Callable[[int], ExpertWeights], width: int) -> ExpertWeights:
    """The slot's weights before its encodings. read(e) gives old expert e in float32. width: neurons to fill up to with zeros, which
    add nothing: act(0) * 0 = 0."""
    total: dict[str, np.ndarray] = {}
    for i, expert in enumerate(slot.sources):
        weights, factor = read(expert), np.float32(slot.weight(i))
        order = np.asarray(slot.alignments[i]) if slot.alignments and slot.alignments[i] else None
        for name, array in arrays_of(weights).items():
            part = factor * along_neurons(name, array, order)
            total[name] = total[name] + part if name in total else part
    if slot.neurons:
        kept = np.asarray(slot.neurons)
        total = {name: along_neurons(name, array, kept) for name, array in total.items()}
    return ExpertWeights(**{f.name: None for f in fields(ExpertWeights)} | {n: _widened(n, a, width) for n, a in total.items()})


def arrays_of(weights: ExpertWeights) -> dict[str, np.ndarray]:
    """The matrices and biases that an expert has, by field."""
    return {f.name: a for f in fields(ExpertWeights) if (a := getattr(weights, f.name)) is not None}


def along_neurons(name: str, array: np.ndarray, chosen: np.ndarray | None) -> np.ndarray:
    """An expert's array with these neurons, in this order; None keeps it."""
    if chosen is None:
        return array
    return array[chosen] if name in ROWS else array[:, chosen] if name in COLUMNS else array


def _widened(name: str, array: np.ndarray, width: int) -> np.ndarray:
    axis = 0 if name in ROWS else 1 if name in COLUMNS else -1
    if axis < 0 or array.shape[axis] == width:
        return array
    more = [(0, 0)] * array.ndim
    more[axis] = (0, width - array.shape[axis])
    return np.pad(array, more)


def mixed_rows(values_E: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """A router's new rows (or biases) from the old ones along axis 0; a row with one source is that row, bit for bit."""
    out = []
    for row in rows:
        factors = row.coefficients or (1.0,)
        if factors == (1.0,):
            out.append(values_E[row.sources[0]])
        else:
            out.append(sum(np.float32(c) * values_E[e].astype(np.float32) for c, e in zip(factors, row.sources, strict=True)))
    return np.stack(out)
