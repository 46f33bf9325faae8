"""Plans that give bits: the encodings of experts, one for all or expert by expert, and of the trunk, and what they leave as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moestro.compress.trunk import TrunkMatrices
from moestro.core.plan import Subject
from moestro.core.plans.compression import STORED, CompressionPlan, Encoding, LayerChange, Slot
from moestro.models.checkpoint import Checkpoint
from moestro.models.codecs.coded import coded_bytes
from moestro.models.layout import Layout


def blank(checkpoint: Checkpoint, layout: Layout, method: str, **fields: Any) -> CompressionPlan:
    """A plan that keeps every expert as it is."""
    layers = tuple(LayerChange(la.ordinal, tuple(Slot((e,)) for e in range(la.num_experts))) for la in layout.facts.layers)
    size = layout.facts.expert_bytes
    subjects = (Subject(checkpoint.source, layout.facts.fingerprint),)
    return CompressionPlan(subjects=subjects, method=method, layers=layers, sizes=(size, size), **fields)


def encode_experts(
    plan: CompressionPlan,
    layout: Layout,
    method: str,
    codecs_LE: str | Sequence[Sequence[str]],
    options: Mapping[str, Any] | None = None,
) -> CompressionPlan:
    """One more encoding for every slot. codecs_LE: one codec for all, or one for each slot of each layer.

    Raises InputError for a codec that is unknown or does not divide the rows.
    """
    rows = [[codecs_LE] * len(la.slots) for la in plan.layers] if isinstance(codecs_LE, str) else [list(row) for row in codecs_LE]
    assert [len(row) for row in rows] == [len(la.slots) for la in plan.layers], "a codec for each slot"
    numbers = {codec: len(plan.encodings) + i for i, codec in enumerate(dict.fromkeys(codec for row in rows for codec in row))}
    layers = tuple(
        replace(la, slots=tuple(replace(s, encodings=(*s.encodings, numbers[c])) for s, c in zip(la.slots, row, strict=True)))
        for la, row in zip(plan.layers, rows, strict=True)
    )
    encodings = (*plan.encodings, *(Encoding(method, codec, dict(options or {})) for codec in numbers))
    made = replace(plan, layers=layers, encodings=encodings)
    return replace(made, sizes=(plan.sizes[0], expert_bytes(made, layout)))


def encode_trunk(
    plan: CompressionPlan, trunk: TrunkMatrices, *, inner: tuple[str, str] | None, outer: tuple[str, str] | None
) -> CompressionPlan:
    """inner: method and codec of attention, shared experts and dense layers; outer: of embedding and head; None leaves them as stored.

    What is left as it is stored is stated by name or, where it is many, by their number.
    """
    encodings, tensors, left = list(plan.encodings), dict(plan.tensors), list(trunk.left)
    for names, wanted in ((trunk.inner, inner), (trunk.outer, outer)):
        if wanted is None:
            left += names
            continue
        tensors |= dict.fromkeys(names, (len(encodings),))
        encodings.append(Encoding(*wanted))
    text = f"{len(left)} matrices stay as they are stored: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"
    return replace(plan, encodings=tuple(encodings), tensors=tensors, stated=(*plan.stated, *([text] if left else [])))


def expert_bytes(plan: CompressionPlan, layout: Layout) -> int:
    """Of all routed experts, each slot counted as often as the file holds it."""
    total = 0
    for la in plan.layers:
        facts = layout.facts.layers[la.ordinal]
        spec = facts.spec
        width = plan.width(layout.facts)
        shapes = [(width, spec.d_model)] * (2 if spec.gated else 1) + [(spec.d_model, width)]
        for row in la.routed:
            numbers = la.slots[row.slot].encodings
            codec = plan.encodings[numbers[-1]].codec if numbers else STORED
            if codec == STORED:
                total += facts.expert_bytes * width // spec.d_expert
            else:
                total += sum(coded_bytes(codec, shape) for shape in shapes)
    return total
