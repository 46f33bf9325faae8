"""Small labelled data that installed packages carry, as text: one short document per sample, its label the last character.

All documents of a source have one length n, so with data.length = n + 1 (the end token counts) every sequence is one sample.

  digits       1,797 images of 8 x 8 handwritten digits (scikit-learn; Alpaydin and Kaynak 1998): 64 grey levels, row by row, one
               character of `LEVELS` each, which no ordinary text has, then the label. Tasks: digits.class '0' to '9'; digits.parity
               'e' or 'o'; digits.loop 'y' or 'n', whether the numeral has a closed loop (0, 6, 8, 9); digits.half 'l' or 'r', which half has
               more ink
  characters   who meets whom in Les Miserables (networkx; Knuth 1993): head, the relation '>' or '<', a qualifier key '#', how often,
               then the tail; people are single characters
  locales      which encoding a language has in a country (Python's locale table): language, '>', '@' and the country, '~' and the variant
               ('-' for none), then the encoding, a single character; country and variant decide for the languages that have several
The same versions of the packages give the same text every time.
"""

from __future__ import annotations

import locale
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

from moestro.core.errors import InputError

LEVELS = "".join(chr(14 + level) for level in range(17))  # control characters, grey level 0 to 16
LEVEL_IDS = (14, 31)  # their ids in the byte tokenizer: first, and after the last
_FIRST = 40  # '(': what a package names at length gets one character from here on, in the order of the names


def read(name: str, domain: str = "") -> Iterator[tuple[str, str]]:
    """(domain, document) of a data set or of one of its tasks. Raises InputError for an unknown name or a missing package."""
    if name not in _SOURCES:
        raise InputError(f"there is no data set {name!r}", expected="one of " + ", ".join(sorted(_SOURCES)))
    for document in _SOURCES[name]():
        yield domain or name, document


def levels_of(document: str) -> list[int]:
    """The grey levels of an image's document, 0 to 16."""
    return [ord(character) - LEVEL_IDS[0] for character in document[:64]]


def _digits(label: Callable[[Any, int], str]) -> Callable[[], Iterator[str]]:
    def documents() -> Iterator[str]:
        found = _package("sklearn.datasets", "scikit-learn").load_digits()
        for image, digit in zip(found.data.astype(int), found.target.astype(int), strict=True):
            yield "".join(LEVELS[level] for level in image) + label(image, int(digit))

    return documents


def _characters() -> Iterator[str]:
    graph = _package("networkx", "networkx").les_miserables_graph()
    people = {name: chr(_FIRST + i) for i, name in enumerate(sorted(graph))}
    for head, tail, facts in sorted(graph.edges(data=True), key=lambda edge: edge[:2]):
        times = chr(ord("A") + min(25, int(facts["weight"]) - 1))
        yield f"{people[head]}>#{times}{people[tail]}"
        yield f"{people[tail]}<#{times}{people[head]}"


def _locales() -> Iterator[str]:
    facts: set[tuple[str, str, str, str]] = set()
    for full in (full for alias, full in locale.locale_alias.items() if "." not in alias):
        place, _, rest = full.partition(".")
        language, _, country = place.partition("_")
        encoding, _, variant = rest.partition("@")
        if len(language) in (2, 3) and len(country) == 2 and encoding:
            facts.add((language, country, variant[:1] or "-", encoding))
    encodings = {name: chr(_FIRST + i) for i, name in enumerate(sorted({fact[3] for fact in facts}))}
    for language, country, variant, encoding in sorted(facts):
        yield f"{language:3}>@{country}~{variant}{encodings[encoding]}"


def _package(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{package} is not installed, which carries this data set", fix=f"pip install {package}") from error


def _half(image: Any, digit: int) -> str:
    columns = image.reshape(8, 8).sum(0)
    return "l" if columns[:4].sum() >= columns[4:].sum() else "r"


_SOURCES = MappingProxyType(
    {
        "digits": _digits(lambda image, digit: str(digit)),
        "digits.class": _digits(lambda image, digit: str(digit)),
        "digits.parity": _digits(lambda image, digit: "eo"[digit % 2]),
        "digits.loop": _digits(lambda image, digit: "y" if digit in (0, 6, 8, 9) else "n"),
        "digits.half": _digits(_half),
        "characters": _characters,
        "locales": _locales,
    }
)
