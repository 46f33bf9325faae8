"""What a measure answers: a table that people and programs read, and notes on how to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """columns: names; rows: one tuple per row, None where there is nothing to say. notes: nulls, limits of validity, what is high."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def column(self, name: str) -> list[Any]:
        """One column's cells."""
        return [row[self.columns.index(name)] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; numbers that are none become null."""
        clean = [[None if isinstance(c, float) and not math.isfinite(c) else c for c in row] for row in self.rows]
        return {"columns": list(self.columns), "rows": clean, "notes": list(self.notes)}


def finding(columns: Sequence[str], rows: Sequence[Sequence[Any]], *notes: str) -> Finding:
    """A finding with numpy's numbers made plain."""
    plain = tuple(tuple(c.item() if hasattr(c, "item") else c for c in row) for row in rows)
    return Finding(tuple(columns), plain, notes)
