"""The cards of one kind, found by walking a package, so that a new method is tested without being named anywhere."""

from __future__ import annotations

import importlib
import pkgutil

from moestro.core.method import Card


def cards(package: str, kind: str) -> list[Card]:
    found: dict[str, Card] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        for obj in vars(importlib.import_module(info.name)).values():
            card = getattr(obj, "__card__", None)
            if isinstance(card, Card) and card.kind == kind:
                found[card.name] = card
    return [found[name] for name in sorted(found)]
