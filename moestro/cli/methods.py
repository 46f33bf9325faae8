"""`moestro methods`: the catalogue of published methods, or one card."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moestro.cli.arguments import Json
from moestro.cli.output import emit, table

EPILOG = """Examples:

\b
  moestro methods
  moestro methods --kind eviction
  moestro methods engine.evict.lru"""


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this method's card.", show_default=False)] = None,
    kind: Annotated[str | None, typer.Option(help="Only methods of this kind.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one method's card: paper, rule, options and how far it is the published one."""
    from moestro.core.errors import InputError
    from moestro.core.method import HEADINGS, card_of, catalogue, load

    rows = catalogue()
    kinds = sorted({row["kind"] for row in rows})
    if kind is not None and kind not in kinds:
        raise InputError(f"there is no kind of method {kind!r}", expected="one of " + ", ".join(kinds), fix="moestro methods")
    if name is None:
        rows = [row for row in rows if kind in (None, row["kind"])]
        if as_json:
            emit(rows)
        else:
            print(
                table(
                    ("method", "kind", "fidelity", "what it is"),
                    [[r[k] for k in ("name", "kind", "fidelity", "title")] for r in rows],
                )
            )
        return
    full = card_of(load(name, kind)).name
    row: dict[str, Any] = next(r for r in rows if r["name"] == full)
    if as_json:
        emit(row)
        return
    paper = f" · https://arxiv.org/abs/{row['paper']}" if row["paper"] else ""
    print(f"{row['name']} · {row['kind']} · {row['fidelity']}{paper}\n\n{row['title']}\n")
    for heading in HEADINGS:
        if text := row["header"].get(heading):
            print(f"{heading:<9}{text}")
    if row["options"]:
        print("\n" + table(("option", "type", "default"), [[o["name"], o["type"], o["default"]] for o in row["options"]]))


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(methods)
