"""From a grouping of experts to merged slots: coefficients, alignments of neurons, and what becomes of the router."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from moestro.compress.fuse.alignment import align
from moestro.compress.stats import LayerStats
from moestro.core.errors import InputError
from moestro.core.experts import ExpertKey
from moestro.core.layer import LayerFacts
from moestro.core.plans.compression import LayerChange, Row, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.experts import read_expert
from moestro.models.layout import Layout

ROUTERS = ("dominant", "mean", "repoint")


@dataclass(frozen=True, slots=True)
class Grouping:
    """labels_E: the group of each expert, 0 to G-1, every one used. alike_EE: likeness of every pair, 1 for the same."""

    labels_E: np.ndarray
    alike_EE: np.ndarray


@dataclass(frozen=True, slots=True)
class Merging:
    """group: a method of kind 'group'; fuse: one of kind 'fuse'. router: 'dominant' keeps the row of a group's most used expert, 'mean' the
    mean of its rows with the fuse's coefficients, 'repoint' all rows, each leading to its group."""

    group: Callable[..., Grouping]
    options: dict[str, Any]
    fuse: Callable[..., np.ndarray]
    align: bool
    router: str


def merged_layer(
    how: Merging, stats: LayerStats, facts: LayerFacts, keep: int, checkpoint: Checkpoint, layout: Layout, alone: Collection[int]
) -> LayerChange:
    """One layer of `keep` slots. alone: places of experts that are merged with no other. Raises InputError."""
    if how.router not in ROUTERS:
        raise InputError(f"the router is to be {how.router!r}", expected=", ".join(ROUTERS))
    if facts.router.groups > 1 and how.router != "repoint":
        raise InputError(
            f"MoE layer {facts.ordinal} routes among groups of experts, which merging would mix",
            expected="a router that keeps its rows",
            fix="give --router repoint, or remove experts instead",
        )
    ids, count_E = stats.ids_E, stats.counts()
    rest = [e for e in range(len(ids)) if e not in alone]
    if not 1 <= keep - len(alone) <= len(rest):
        raise InputError(
            f"{len(alone)} experts of MoE layer {facts.ordinal} are protected and {keep} groups wanted", fix="keep more"
        )
    whole = how.group(
        LayerStats(stats.profile, stats.ordinal, tuple(int(ids[e]) for e in rest)), keep - len(alone), **how.options
    )
    groups = [[rest[i] for i in np.flatnonzero(whole.labels_E == g)] for g in range(keep - len(alone))] + [
        [e] for e in sorted(alone)
    ]
    groups = [sorted(members, key=lambda e: (-count_E[e], e)) for members in groups]
    groups.sort(key=min)
    place, lost = {e: i for i, e in enumerate(rest)}, 0.0
    slots, rows = [], []
    for members in groups:
        share = how.fuse(count_E[members])
        used = np.flatnonzero(share)
        sources = tuple(int(ids[members[i]]) for i in used)
        coefficients = tuple(float(c) for c in share[used]) if len(used) > 1 else ()
        slots.append(
            Slot(sources, coefficients, _alignments(sources, facts, checkpoint, layout) if how.align and len(used) > 1 else ())
        )
        rows.append(
            Row(len(rows), sources if how.router == "mean" else sources[:1], coefficients if how.router == "mean" else ())
        )
        lost += sum(count_E[e] * (1 - whole.alike_EE[place[e], place[members[0]]]) for e in members[1:])
    if how.router == "repoint":
        leads = {int(ids[e]): g for g, members in enumerate(groups) for e in members}
        rows = [Row(leads[e], (e,)) for e in sorted(leads)]
    return LayerChange(facts.ordinal, tuple(slots), tuple(rows), float(lost / max(1.0, count_E.sum())))


def _alignments(
    sources: tuple[int, ...], facts: LayerFacts, checkpoint: Checkpoint, layout: Layout
) -> tuple[tuple[int, ...], ...]:
    """Of each source to the first; () where no neuron moves."""
    first = read_expert(checkpoint, layout, ExpertKey(facts.ordinal, sources[0]))
    out: list[tuple[int, ...]] = [()]
    for e in sources[1:]:
        order_F = align(first, read_expert(checkpoint, layout, ExpertKey(facts.ordinal, e)))
        still = np.array_equal(order_F, np.arange(len(order_F)))
        out.append(() if still else tuple(int(f) for f in order_F))
    return tuple(out) if any(out) else ()
