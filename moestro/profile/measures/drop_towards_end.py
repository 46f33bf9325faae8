"""Drop towards the end: which tokens a fixed expert capacity would drop.

Paper      Xue et al. 2024, arXiv 2402.01739 (OpenMoE)
Idea       Where a batch's tokens are served in order and experts are full, late tokens are dropped, the more the less balanced the text.
Rule       C = ceil(factor * T * k / E) per expert and sequence; in order of position and slot the assignments beyond C are dropped. Rate per
           quarter of the sequence
Needs      a trace
Gives      per layer the drop rate of each quarter, and per label over all layers
Departs    nothing
Checked    dropped = sum of max(0, load - C); a dropped assignment has C earlier ones of its expert; even loads drop nothing
"""

from __future__ import annotations

import math

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.core.trace import Trace
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile

QUARTERS = 4


@method("profile.measures.drop_towards_end", kind="measure", paper="2402.01739", fidelity="faithful", needs=("trace",))
def drop_towards_end(profile: Profile, *, factor: float = 1.25) -> Finding:
    """factor: capacity over the even share."""
    if factor <= 0:
        raise InputError(f"factor is {factor}", expected="above 0")
    trace = profile.need_trace()
    labels = trace.info.get("label_of_sequence") or [0]
    names = trace.info.get("labels") or ["all"]
    by_layer = np.zeros((trace.layers, QUARTERS, 2))
    by_label = np.zeros((len(names), QUARTERS, 2))
    for number, sequence in enumerate(np.unique(trace.sequences_T)):
        rows = np.flatnonzero(trace.sequences_T == sequence)
        quarter_T = np.arange(len(rows)) * QUARTERS // len(rows)
        for layer in range(trace.layers):
            lost_TK, asked_TK = dropped(trace, layer, rows, factor)
            for q in range(QUARTERS):
                found = np.array([lost_TK[quarter_T == q].sum(), asked_TK[quarter_T == q].sum()])
                by_layer[layer, q] += found
                by_label[labels[number] if number < len(labels) else 0, q] += found
    rows_told = [(f"layer {la}", *_rates(by_layer[la])) for la in range(trace.layers)]
    rows_told += [(name, *_rates(by_label[g])) for g, name in enumerate(names) if len(names) > 1]
    return finding(
        ("where", "first", "second", "third", "last", "all"),
        rows_told,
        f"share of assignments dropped in each quarter of a sequence at a capacity of {factor:g} times the even share.",
        "Only a model run with fixed capacity drops; moestro never does.",
    )


def dropped(trace: Trace, layer: int, rows: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """(dropped_TK, asked_TK) of one sequence: first come, first served."""
    ids_TK = np.asarray(trace.experts_LTK[layer, rows], np.int64)
    asked_TK = ids_TK >= 0
    top_k = int(asked_TK.sum(1).max(initial=0))
    capacity = math.ceil(factor * len(rows) * top_k / trace.num_experts[layer] - 1e-9)
    flat = ids_TK.reshape(-1)
    order = np.argsort(flat, kind="stable")
    place = np.empty(len(flat), np.int64)
    starts = np.searchsorted(flat[order], flat[order], side="left")
    place[order] = np.arange(len(flat)) - starts  # how many of its expert came before
    return (place.reshape(ids_TK.shape) >= capacity) & asked_TK, asked_TK


def _rates(counts_Q2: np.ndarray) -> list[float]:
    lost, asked = [*counts_Q2[:, 0], counts_Q2[:, 0].sum()], [*counts_Q2[:, 1], counts_Q2[:, 1].sum()]
    return [float(a / b) if b else float("nan") for a, b in zip(lost, asked)]
