"""Experts that no method may take away: the Super Experts of arXiv 2507.23279, found by `profile.measures.super_experts`."""

from __future__ import annotations

from dataclasses import replace

from moestro.core.experts import ExpertKey
from moestro.core.plans.compression import CompressionPlan
from moestro.profile.measures.super_experts import super_experts
from moestro.profile.profile import Profile


def guarded(profile: Profile) -> tuple[tuple[ExpertKey, ...], str]:
    """The protected experts, and what the reader has to know: nothing, or that they could not be looked for."""
    if "output_most_LE" not in profile.arrays:
        return (), "Super Experts were not looked for: the profile was made without --probe maxima"
    found = super_experts(profile)
    return tuple(map(ExpertKey, found.column("layer"), found.column("expert"))), ""


def spared(plan: CompressionPlan, before: CompressionPlan, protected: tuple[ExpertKey, ...], *, sparing: bool) -> CompressionPlan:
    """The plan with the slots that hold a protected expert as they were in `before`, or, where all slots have to be alike, with a word
    on what is done to them."""
    keys = {tuple(key) for key in protected}
    held = [[any((la.ordinal, e) in keys for e in slot.sources) for slot in la.slots] for la in plan.layers]
    if not any(map(any, held)):
        return plan
    if not sparing:
        names = ", ".join(f"layer {key.layer} expert {key.expert}" for key in protected)
        return replace(plan, stated=(*plan.stated, f"Super Experts are changed like all others: {names}"))
    layers = tuple(
        replace(la, slots=tuple(old if kept else new for new, old, kept in zip(la.slots, was.slots, row, strict=True)))
        for la, was, row in zip(plan.layers, before.layers, held, strict=True)
    )
    return replace(plan, layers=layers, protected=tuple(dict.fromkeys((*plan.protected, *protected))))
