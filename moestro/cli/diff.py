"""`moestro diff`: what two plans do differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.arguments import Json
from moestro.cli.output import emit, table

EPILOG = """Examples:

\b
  moestro diff small.json large.json

Exit code 0 when the plans are equal, 1 when they differ."""


def diff(
    first: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    second: Annotated[Path, typer.Argument(metavar="PLAN", help="Another of the same kind.")],
    as_json: Json = False,
) -> int:
    """Show every field in which two plans differ."""
    from moestro.core.errors import PlanError
    from moestro.core.plan import read_plan

    a, b = read_plan(first), read_plan(second)
    if a.kind != b.kind:
        raise PlanError(f"{first} is a {a.kind} plan, {second} a {b.kind} plan", expected="two plans of one kind")
    rows = a.diff(b)
    if as_json:
        emit({"equal": not rows, "differences": [{"field": at, "first": x, "second": y} for at, x, y in rows]})
    elif rows:
        print(table(("field", str(first), str(second)), rows))
    else:
        print("the plans are equal")
    return 1 if rows else 0


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(diff)
