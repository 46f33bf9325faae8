"""What the command prints: results on stdout (tables, or JSON with --json), everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Report = Callable[[int, int], None]  # (done, total)


def say(*lines: str) -> None:
    """A message for the person, on stderr."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def emit(value: Any) -> None:
    """The whole result as JSON on stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


def size(nbytes: float) -> str:
    """Bytes for people, as they are written on the command line too."""
    from moestro.engine.sizes import format_size

    return format_size(int(nbytes))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns; cells that look like numbers are set to the right."""
    cells = [list(map(str, header)), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [
        len(cells) > 1 and all(row[i][:1].isdigit() or row[i][:1] in "-+." for row in cells[1:]) for i in range(len(header))
    ]
    lines = ["  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def shaded(share: float) -> str:
    """One cell of a drawing: the darker, the larger `share` (0 to 1); a dot for nothing at all."""
    return "░▒▓█"[min(3, int(4 * share))] if share > 0 else "·"


@contextmanager
def progress(title: str, unit: str, quiet: bool = False) -> Iterator[Report]:
    """A progress bar on stderr, shown only at a terminal; yields report(done, total). unit: 'bytes' or what is counted."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    counted = (
        (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (TextColumn("{task.completed}/{task.total} " + unit),)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
