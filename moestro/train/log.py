"""The record of a run: one JSON object a line, kept equal to the checkpoints however the run ended."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moestro.core.errors import StorageError

FILE = "log.jsonl"


class Log:
    """Appends to log.jsonl of a run's folder. keep: entries of later steps, and a last line cut off by a kill, are removed first."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.path = folder / FILE
        entries = [entry for entry in read(folder) if entry["step"] <= keep]
        try:
            partial = self.path.with_name(FILE + ".partial")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
            os.replace(partial, self.path)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error}", fix="choose another --output") from error

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry; it has a `step`. Readable at once. Raises StorageError."""
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error}", fix="make room, then --resume") from error

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint is never newer than its log."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run, up to the first line that is not whole."""
    path, entries = folder / FILE, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries
