"""Method cards: what a published method is, attached to the code that implements it.

`@method` writes no global table. `moestro.core.catalogue` walks the package and writes `catalogue.json`, which the
command line reads so that listing methods imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, TypeVar

from moestro.core.errors import InputError

FIDELITIES = ("exact", "faithful", "adapted")
HEADINGS = ("Paper", "Idea", "Rule", "Needs", "Gives", "Departs", "Checked")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword argument of a method: also a plan's option and a command-line flag."""

    name: str
    type: str
    default: Any


@dataclass(frozen=True, slots=True)
class Card:
    """A method's public description. name: its import path below `moestro.`; title: the header's first line."""

    name: str
    kind: str
    title: str
    paper: str
    fidelity: str
    needs: tuple[str, ...]
    traits: tuple[str, ...]
    options: tuple[Option, ...]
    header: dict[str, str]
    module: str
    attribute: str


def method(
    name: str,
    *,
    kind: str,
    fidelity: str,
    paper: str = "",
    needs: tuple[str, ...] = (),
    traits: tuple[str, ...] = (),
) -> Callable[[T], T]:
    """Attach a card to a function or class. The module's docstring is its header; typed keyword arguments are its options.

    Args:
        traits: names of laws of this kind that are switched off for it, with the reason in the header's `Departs`; of kind 'encode',
            'stored' says that it takes weights in any float format (bf16 as uint16 bit patterns), not in float32 only.
    """
    assert fidelity in FIDELITIES, fidelity

    def attach(obj: T) -> T:
        module = sys.modules[obj.__module__]  # type: ignore[attr-defined]
        title, header = parse_header(module.__doc__ or "")
        card = Card(
            name,
            kind,
            title,
            paper,
            fidelity,
            needs,
            traits,
            _options(obj),
            header,
            obj.__module__,
            obj.__name__,  # type: ignore[attr-defined]
        )
        obj.__card__ = card  # type: ignore[attr-defined]
        return obj

    return attach


def parse_header(doc: str) -> tuple[str, dict[str, str]]:
    """Title and headed paragraphs of a method file's docstring."""
    lines = inspect.cleandoc(doc).splitlines()
    title, header, current = (lines[0] if lines else ""), {}, None
    for line in lines[1:]:
        word = line.split(" ", 1)[0]
        if word in HEADINGS:
            current = word
            header[current] = line[len(word) :].strip()
        elif current and line.strip():
            header[current] += " " + line.strip()
    return title, header


def _options(obj: Any) -> tuple[Option, ...]:
    parameters = inspect.signature(obj).parameters.values()
    return tuple(
        Option(p.name, str(p.annotation), None if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    )


def catalogue() -> list[dict[str, Any]]:
    """Every method's card as plain data, from the generated index; imports no method."""
    return json.loads(resources.files("moestro").joinpath("catalogue.json").read_text(encoding="utf-8"))


def load(name: str, kind: str | None = None) -> Any:
    """The function or class of the method called `name` (full name, or its last part when that is unambiguous in `kind`).

    Raises:
        InputError: no such method; names the nearest ones.
    """
    rows = [row for row in catalogue() if kind is None or row["kind"] == kind]
    found = [r for r in rows if r["name"] == name] or [r for r in rows if r["name"].rsplit(".", 1)[-1] == name]
    if len(found) == 1:
        return getattr(importlib.import_module(found[0]["module"]), found[0]["attribute"])
    names = [r["name"] for r in rows] + [r["name"].rsplit(".", 1)[-1] for r in rows]
    if found:
        raise InputError(f"{name!r} is the name of {len(found)} methods", expected=" or ".join(r["name"] for r in found))
    near = difflib.get_close_matches(name, names, n=3)
    what = f"a method of kind {kind!r}" if kind else "a method"
    raise InputError(
        f"{name!r} is not {what}",
        expected="one of " + ", ".join(sorted({r["name"].rsplit(".", 1)[-1] for r in rows})),
        fix=f"did you mean {' or '.join(near)}?" if near else "moestro methods",
    )


def card_of(obj: Any) -> Card:
    """The card attached to a method's function, class or instance."""
    return obj.__card__


def check_options(card: Card, options: Mapping[str, Any], *, beside: tuple[str, ...] = ()) -> None:
    """Raises InputError for an option that the method does not have, or whose value is not of the type that its card says.

    beside: keyword arguments that are no options of this use.
    """
    known = {o.name: o.type for o in card.options if o.name not in beside}
    for name, value in options.items():
        if name not in known:
            raise InputError(
                f"{card.name} has no option {name!r}",
                expected=", ".join(known) or "no options",
                fix=f"moestro methods {card.name}",
            )
        if not fits(value, known[name]):
            raise InputError(f"{card.name}: {name} is {value!r}", expected=f"a value of type {known[name]}")


def fits(value: Any, type_name: str) -> bool:
    """Whether an option's value is of the type its card says; types that are not plain are not checked."""
    plain = {"int": int, "float": (int, float), "bool": bool, "str": str}
    if type_name not in plain:
        return True
    return isinstance(value, plain[type_name]) and (type_name == "bool" or not isinstance(value, bool))


def as_row(card: Card) -> dict[str, Any]:
    """A card as JSON-ready data."""
    return asdict(card)
