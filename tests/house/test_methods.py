"""Every method file carries a complete header and a card, and the generated index is fresh."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from moestro.core.catalogue import collect
from moestro.core.method import FIDELITIES, HEADINGS, catalogue, load
from tests.house.source import ROOT

ROWS = catalogue()


def test_catalogue_is_fresh():
    done = subprocess.run([sys.executable, "-m", "moestro.core.catalogue", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_catalogue_holds_what_the_package_attaches():
    assert [card.name for card in collect()] == [row["name"] for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_card(row):
    assert row["name"] == row["module"].removeprefix("moestro."), "a method is named after its file"
    assert row["fidelity"] in FIDELITIES
    assert not row["paper"] or re.fullmatch(r"\d{4}\.\d{4,5}", row["paper"])
    missing = [h for h in HEADINGS if not row["header"].get(h, "").strip()]
    assert not missing, f"the header of {row['module']} lacks {missing}"
    assert row["title"].endswith(".")
    if row["fidelity"] == "adapted" or row["traits"]:
        assert not row["header"]["Departs"].lower().startswith("nothing"), "say what differs"
    assert load(row["name"], row["kind"]) is getattr(importlib.import_module(row["module"]), row["attribute"])
    assert all(option["type"] != "<class 'inspect._empty'>" for option in row["options"]), "options are typed"
