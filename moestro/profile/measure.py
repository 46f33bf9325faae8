"""How a measure is called: a pure function of a profile with typed keyword options that answers with a `Finding`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moestro.core.errors import InputError
from moestro.core.method import card_of
from moestro.profile.finding import Finding
from moestro.profile.probe import fits
from moestro.profile.profile import Profile

Measure = Callable[..., Finding]  # measure(profile, *, option=..., ...)


def apply(measure: Measure, profile: Profile, options: Mapping[str, Any]) -> Finding:
    """The finding. Raises InputError for an unknown or wrong option, ProfileError when the profile lacks what is measured."""
    card = card_of(measure)
    known = {option.name: option for option in card.options}
    for name, value in options.items():
        if name not in known:
            raise InputError(
                f"{card.name} has no option {name!r}",
                expected=", ".join(known) or "no options",
                fix=f"moestro methods {card.name}",
            )
        if not fits(value, known[name].type):
            raise InputError(f"{card.name}: {name} is {value!r}", expected=f"a value of type {known[name].type}")
    return measure(profile, **options)
