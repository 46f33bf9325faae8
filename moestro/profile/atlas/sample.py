"""A sample of the trace to read: stretches of text of every label, and for each rare expert one in which it is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moestro.core.trace import Trace

STRETCH = 256  # tokens of one sequence at most
AROUND = 16  # tokens on either side of a rare expert's
BYTES = 700_000  # of expert ids


@dataclass(frozen=True, slots=True)
class Sample:
    """Stretches of the trace, one after another. rows_N: rows of the trace; starts_X, labels_X: of each stretch."""

    rows_N: np.ndarray
    starts_X: tuple[int, ...]
    labels_X: tuple[str, ...]
    sequences_X: tuple[int, ...]


def sample(trace: Trace, room: int = BYTES) -> Sample:
    """The first tokens of sequences, the labels taking turns, then stretches around experts that were not among them."""
    slots = trace.experts_LTK.shape[0] * trace.experts_LTK.shape[2] * (1 if max(trace.num_experts) < 256 else 2)
    left = max(2 * AROUND, room // slots)
    spare = left // 4  # for rare experts
    stretches: list[np.ndarray] = []
    sequences_T = np.asarray(trace.sequences_T)
    for number in in_turn(trace):
        rows = np.flatnonzero(sequences_T == number)[: max(0, min(STRETCH, left - spare))]
        if not len(rows):
            break
        stretches.append(rows)
        left -= len(rows)
    shown_T = np.zeros(trace.tokens, bool)
    shown_T[np.concatenate(stretches)] = True
    for layer, experts in enumerate(trace.num_experts):
        ids_TK = np.asarray(trace.experts_LTK[layer])
        found = set(np.unique(ids_TK[shown_T]).tolist())
        first = {int(e): int(at) // ids_TK.shape[1] for e, at in zip(*np.unique(ids_TK, return_index=True)) if e >= 0}
        for expert in range(experts):
            if expert in found or expert not in first:
                continue
            at = first[expert]
            near = np.arange(max(0, at - AROUND), min(trace.tokens, at + AROUND + 1))
            near = near[sequences_T[near] == sequences_T[at]]
            if len(near) > left:
                break
            stretches.append(near)
            left -= len(near)
            shown_T[near] = True
            found |= set(np.unique(ids_TK[near]).tolist())
    lengths = [len(rows) for rows in stretches]
    numbers = [int(sequences_T[rows[0]]) for rows in stretches]
    starts = np.cumsum([0, *lengths[:-1]])
    return Sample(
        np.concatenate(stretches),
        tuple(starts.tolist()),
        tuple(label_of(trace, number) for number in numbers),
        tuple(numbers),
    )


def in_turn(trace: Trace) -> list[int]:
    """The sequences' numbers, one of each label after the other."""
    waiting: dict[str, list[int]] = {}
    for number in dict.fromkeys(np.asarray(trace.sequences_T).tolist()):
        waiting.setdefault(label_of(trace, number), []).append(number)
    turns = [(place, number) for numbers in waiting.values() for place, number in enumerate(numbers)]
    return [number for _, number in sorted(turns, key=lambda turn: turn[0])]


def label_of(trace: Trace, sequence: int) -> str:
    """The label of most tokens of a sequence; '' where the trace does not say."""
    of_S, names = trace.info.get("label_of_sequence", ()), trace.info.get("labels", ())
    return str(names[of_S[sequence]]) if sequence < len(of_S) and of_S[sequence] < len(names) else ""


def as_decoded(trace: Trace, tokens: int) -> Trace:
    """About `tokens` tokens of whole sequences, the labels taking turns, one token per pass: what a cache would see when they are generated.

    A profile reads each sequence in one pass, in which nearly every expert of a layer is needed whatever the text.
    """
    sequences_T = np.asarray(trace.sequences_T)
    rows: list[np.ndarray] = []
    for number in in_turn(trace):
        rows.append(np.flatnonzero(sequences_T == number)[: tokens - sum(map(len, rows))])
        if sum(map(len, rows)) >= tokens:
            break
    rows_T = np.concatenate(rows)
    return replace(
        trace,
        tokens_T=np.asarray(trace.tokens_T)[rows_T],
        sequences_T=sequences_T[rows_T],
        positions_T=np.asarray(trace.positions_T)[rows_T],
        steps_T=np.arange(len(rows_T), dtype=np.int32),
        prefill_T=np.zeros(len(rows_T), np.uint8),
        experts_LTK=np.asarray(trace.experts_LTK)[:, rows_T],
        weights_LTK=None,
        logits_LTE=None,
        ahead_LTK=None,
    )
