"""Experts that no method may take away: the Super Experts of arXiv 2507.23279, found by `profile.measures.super_experts`."""

from __future__ import annotations

from moestro.core.experts import ExpertKey
from moestro.profile.measures.super_experts import super_experts
from moestro.profile.profile import Profile


def guarded(profile: Profile) -> tuple[tuple[ExpertKey, ...], str]:
    """The protected experts, and what the reader has to know: nothing, or that they could not be looked for."""
    if "output_most_LE" not in profile.arrays:
        return (), "Super Experts were not looked for: the profile was made without --probe maxima"
    found = super_experts(profile)
    return tuple(map(ExpertKey, found.column("layer"), found.column("expert"))), ""
