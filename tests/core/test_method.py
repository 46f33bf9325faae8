"""Method cards: the header is parsed, keyword options are kept, names are found or refused with the nearest ones."""

from __future__ import annotations

import sys
import types

import pytest

from moestro.core import catalogue as index
from moestro.core.errors import MoestroError
from moestro.core.method import as_row, card_of, catalogue, load, method, parse_header

HEADER = """Title of the idea.

Paper      Someone 2024, arXiv 2401.00001
Idea       one sentence
           that goes on
Rule       y = f(x)
Departs    nothing
"""


def attach(obj, **more):
    module = types.ModuleType("moestro.pretend.thing")
    module.__doc__ = HEADER
    sys.modules[module.__name__] = module
    try:
        obj.__module__ = module.__name__
        return method("pretend.thing", kind="pretence", fidelity="faithful", paper="2401.00001", **more)(obj)
    finally:
        del sys.modules[module.__name__]


def test_parse_header():
    title, header = parse_header(HEADER)
    assert title == "Title of the idea."
    assert header == {
        "Paper": "Someone 2024, arXiv 2401.00001",
        "Idea": "one sentence that goes on",
        "Rule": "y = f(x)",
        "Departs": "nothing",
    }
    assert parse_header("") == ("", {})


def test_a_card_of_a_function():
    def thing(x, *, share: float = 0.5, deep: bool = False): ...

    card = card_of(attach(thing, needs=("counts",)))
    assert (card.name, card.kind, card.fidelity, card.needs) == ("pretend.thing", "pretence", "faithful", ("counts",))
    assert [(o.name, o.type, o.default) for o in card.options] == [("share", "float", 0.5), ("deep", "bool", False)]
    row = as_row(card)
    page = index.page(row)
    assert "**Rule.** y = f(x)" in page and "| `share` | `float` | `0.5` |" in page and "arXiv 2401.00001" in page


def test_a_card_of_a_class_takes_its_constructor():
    class Thing:
        def __init__(self, *, capacity: int, ratio: float = 0.8) -> None: ...

    card = card_of(attach(Thing))
    assert [o.name for o in card.options] == ["capacity", "ratio"] and card.attribute == "Thing"


def test_an_unknown_fidelity_is_a_programmers_error():
    with pytest.raises(AssertionError):
        method("x", kind="y", fidelity="rough")


def test_load_refuses_and_names_the_nearest():
    name = catalogue()[0]["name"]
    with pytest.raises(MoestroError) as caught:
        load(name + "x")
    assert name in caught.value.fix
    with pytest.raises(MoestroError, match="not a method of kind"):
        load(name, kind="no such kind")


def test_load_by_full_and_by_last_name():
    for row in catalogue():
        assert card_of(load(row["name"])).name == row["name"]
        assert card_of(load(row["name"].rsplit(".", 1)[-1], row["kind"])).name == row["name"]
