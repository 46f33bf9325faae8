"""How a measure is called: a pure function of a profile with typed keyword options that answers with a `Finding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moestro.core.method import card_of, check_options
from moestro.profile.finding import Finding
from moestro.profile.profile import Profile

Measure = Callable[..., Finding]  # measure(profile, *, option=..., ...)


def apply(measure: Measure, profile: Profile, options: Mapping[str, Any]) -> Finding:
    """The finding. Raises InputError for an unknown or wrong option, ProfileError when the profile lacks what is measured."""
    check_options(card_of(measure), options)
    return measure(profile, **options)
