"""Text out of files, folders, JSON lines, Parquet, Hub datasets and what this Python installation carries, with a domain each."""

from __future__ import annotations

import glob
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moestro.core.errors import InputError
from moestro.train.data import installed, samples

_ROWS = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+?))?(:(?P<pattern>.+))?", re.ASCII)
_HUB_FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.ndjson", "*.txt")


def read(spec: str, *, field: str = "text", domain_field: str = "") -> Iterator[tuple[str, str]]:
    """(domain, document) for every document of a source.

    Args:
        spec: `[DOMAIN=]WHERE`, where WHERE is a file, a folder, a pattern with `*`, `installed[:DOMAIN]`, `samples:NAME[.TASK]`
            or `hub:org/name[@revision][:PATTERN]`. Without DOMAIN it is the file's or the folder's name; each folder inside a folder is
            a domain of its own.
        field: the text's name in JSON lines and Parquet. domain_field: the domain's name there, '' if the rows carry none.

    A text file is one document, so is a row. Raises InputError for what is missing, empty, not UTF-8 or has no such field.
    """
    domain, where = _split(spec)
    if where.startswith("samples:"):
        yield from samples.read(where.removeprefix("samples:"), domain)
        return
    if where.partition(":")[0] == "installed":
        yield from _installed(where, domain)
        return
    for name, file in _hub(where.removeprefix("hub:")) if where.startswith("hub:") else _files(where):
        for label, text in _documents(file, field, domain_field):
            if text:
                yield domain or label or name, text


def _split(spec: str) -> tuple[str, str]:
    domain, equals, where = spec.partition("=")
    if not equals or Path(spec).expanduser().exists():
        return "", spec
    if not domain or not where:
        raise InputError(f"the text source {spec!r} lacks a name or a place", expected="DOMAIN=WHERE, or only WHERE")
    return domain, where


def _installed(where: str, domain: str) -> Iterator[tuple[str, str]]:
    _, _, wanted = where.partition(":")
    for name in [wanted] if wanted else installed.domains():
        yield domain or name, installed.whole(name)


def _files(where: str) -> Iterator[tuple[str, Path]]:
    """(domain, file), sorted by path."""
    path = Path(where).expanduser()
    if path.is_file():
        yield path.name.split(".")[0], path
        return
    if path.is_dir():
        root, found = path, sorted(path.rglob("*"))
    else:
        root = Path(re.split(r"[*?\[]", str(path))[0] + "x").parent
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    files = [f for f in found if f.is_file() and not any(part.startswith(".") for part in f.relative_to(root).parts)]
    if not files:
        raise InputError(
            f"there is no text at {where}",
            expected="a file, a folder with files, a pattern, installed[:DOMAIN], samples:NAME or hub:org/name",
            fix="check the path",
        )
    for file in files:
        parts = file.relative_to(root).parts
        yield parts[0] if len(parts) > 1 else root.resolve().name, file


def _hub(where: str) -> Iterator[tuple[str, Path]]:
    """(domain, file) of a data set on the Hub; its cache is used as it is, so a second run needs no connection."""
    match = _HUB.fullmatch(where)
    if match is None:
        raise InputError(f"hub:{where} names no data set", expected="hub:org/name, hub:org/name@revision:PATTERN")
    from huggingface_hub import snapshot_download

    patterns = [match["pattern"]] if match["pattern"] else list(_HUB_FILES)
    try:
        folder = Path(snapshot_download(match["name"], repo_type="dataset", revision=match["revision"], allow_patterns=patterns))
    except Exception as error:  # the library raises its own, its HTTP client's and OSError
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the data set {match['name']} could not be fetched: {said}",
            expected="a data set on the Hub, or in its cache",
            fix="check the name and the connection; for a gated one run `hf auth login`",
        ) from error
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and any(f.match(p) for p in patterns)]
    if not files:
        raise InputError(f"the data set {match['name']} has no file like {', '.join(patterns)}", fix="give hub:org/name:PATTERN")
    for file in files:
        yield match["name"].split("/")[1], file


def _documents(file: Path, field: str, domain_field: str) -> Iterator[tuple[str, str]]:
    """(domain or '', text)."""
    if file.suffix == ".parquet":
        rows: Iterator[tuple[int, Any]] = _parquet(file, field, domain_field)
    elif file.name.endswith(_ROWS):
        rows = _json_rows(file)
    else:
        yield "", _decoded(_bytes(file), file)
        return
    for number, row in rows:
        text = row.get(field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"row {number} of {file} has no text {field!r}, only: {has}", fix="--set data.text_field=NAME")
        if domain_field and domain_field not in row:
            raise InputError(f"row {number} of {file} has no {domain_field!r}, only: {', '.join(map(str, row))}")
        yield str(row[domain_field]) if domain_field else "", text


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise InputError(f"row {number} of {file} is no JSON: {error}") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _parquet(file: Path, field: str, domain_field: str) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow  # type: ignore[import-not-found]
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(f"{file} is a Parquet file, and pyarrow is not installed", fix="pip install pyarrow") from error
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in (field, domain_field) if name in table.schema_arrow.names]
        for piece in table.iter_batches(columns=columns or None):
            for row in piece.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _decoded(raw: bytes, file: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte {raw[error.start]:#04x} at position {error.start}",
            expected="text in UTF-8, JSON lines or Parquet",
            fix="convert it, or choose the files by a pattern such as 'folder/**/*.txt'",
        ) from error
