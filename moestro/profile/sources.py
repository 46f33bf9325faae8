"""Documents from what people name: a file, a folder, JSON lines, chats, or a data set on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.core.errors import InputError

TEXT_COLUMNS = ("text", "content", "prompt", "sentence", "document")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TOKEN_COLUMN = "tokens"
LABELLED = re.compile(r"(?P<label>[\w.-]+)=(?P<data>.+)", re.ASCII | re.DOTALL)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)
HUB_FILES = ("*.jsonl", "*.json", "*.txt", "*.parquet")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # as ShareGPT writes them


@dataclass(frozen=True, slots=True)
class Document:
    """One of text, messages (a chat) or tokens. label: '' when there is none. source: the file, for messages to people."""

    label: str
    source: str
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tokens: list[int] | None = None


def read(data: Sequence[str], *, label: str = "file", text_column: str | None = None) -> list[Document]:
    """Every document of these sources, in order.

    Args:
        data: paths, Hub data set names, or NAME=PATH, which labels all of it NAME.
        label: where labels come from: 'file' (its name), 'folder' (the one that holds it), 'column:NAME', or 'none'.
        text_column: the text's place in JSON rows; by default the first usual one.

    Raises:
        InputError: nothing there, not UTF-8, not JSON, a missing column, or a data set that cannot be fetched.
    """
    kind, _, column = label.partition(":")
    if kind not in ("file", "folder", "column", "none") or (kind == "column") != bool(column):
        raise InputError(f"--label is {label!r}", expected="file, folder, part, none or column:NAME")
    out: list[Document] = []
    for entry in data:
        fixed = None
        if not Path(entry).expanduser().exists() and (match := LABELLED.fullmatch(entry)):
            entry, fixed = match["data"], match["label"]
        root, files = _files(Path(entry).expanduser(), entry)
        for file in files:
            name = fixed or {"file": file.stem, "folder": file.parent.name}.get(kind, "all")
            out += _documents(file, name, text_column, column if fixed is None else "")
        if not files:
            raise InputError(f"{root} holds no files to read", expected="text or JSON lines")
    if not out:
        raise InputError(f"{', '.join(data) or 'nothing'} holds no documents", expected="at least one text")
    return out


def _files(path: Path, entry: str) -> tuple[Path, list[Path]]:
    if path.is_file():
        return path, [path]
    if not path.is_dir():
        if not HUB_ID.fullmatch(entry) or entry.startswith((".", "/", "~")):
            raise InputError(
                f"there is no file or folder {path}", expected="text, JSON lines, a folder or a Hub data set org/name"
            )
        path = _from_hub(entry)
        found = [
            f
            for f in sorted(path.rglob("*"))
            if f.is_file() and any(f.match(p) for p in HUB_FILES) and f.name != "dataset_infos.json"
        ]
        return path, found
    shown = (f for f in path.rglob("*") if f.is_file() and not any(part.startswith(".") for part in f.relative_to(path).parts))
    return path, sorted(shown)


def _from_hub(entry: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = entry.partition("@")
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=list(HUB_FILES))
    except Exception as error:  # the library raises its own, its HTTP client's and OSError
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"there is no file {entry}, and no such data set could be fetched from the Hub: {said}",
            expected="a path, or org/name of a data set",
            fix="check the name and the connection, or download it and give the folder",
        ) from error
    return Path(folder)


def _documents(file: Path, label: str, text_column: str | None, label_column: str) -> Iterator[Document]:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        rows: Iterator[Any] = _parquet(file)
    elif suffix in (".jsonl", ".ndjson", ".json"):
        rows = _json(file, lines=suffix != ".json")
    elif label_column:
        raise InputError(
            f"{file} is plain text and has no column {label_column!r}", expected="JSON lines", fix="use --label file"
        )
    else:
        if text := _utf8(file).strip():
            yield Document(label, str(file), text=text)
        return
    for number, row in enumerate(rows, 1):
        at = f"{file}, row {number}"
        if isinstance(row, str):
            row = {"text": row}
        if isinstance(row, list) and row and all(isinstance(m, dict) for m in row):
            row = {"messages": row}
        if not isinstance(row, dict):
            raise InputError(f"{at} is a JSON {type(row).__name__}", expected="an object, a text or a list of messages")
        if label_column:
            if row.get(label_column) is None:
                raise InputError(f"{at} has no {label_column!r}", expected=f"a label; it has {', '.join(map(str, row))}")
            label = str(row[label_column])
        yield _row(row, at, label, str(file), text_column)


def _row(row: dict[str, Any], at: str, label: str, source: str, text_column: str | None) -> Document:
    if text_column is not None and text_column not in row:
        raise InputError(f"{at} has no {text_column!r}", expected=f"a text; it has {', '.join(map(str, row))}")
    columns = (text_column,) if text_column else (TOKEN_COLUMN, *CHAT_COLUMNS, *TEXT_COLUMNS)
    for name in columns:
        value = row.get(name)
        if isinstance(value, str):
            return Document(label, source, text=value)
        if isinstance(value, list) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return Document(label, source, tokens=value)
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            return Document(label, source, messages=[_message(m, at) for m in value])
    raise InputError(
        f"{at} has no text: it has {', '.join(map(str, row)) or 'nothing'}",
        expected=f"one of {', '.join((*TEXT_COLUMNS, *CHAT_COLUMNS, TOKEN_COLUMN))}",
        fix="name the column with --text-column",
    )


def _message(message: dict[str, Any], at: str) -> dict[str, Any]:
    """A message as templates want it, with 'role' and 'content'."""
    if "from" in message and "value" in message:
        return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    if "role" not in message:
        raise InputError(f"{at}: a message has no role: {json.dumps(message)[:80]}", expected="'role' and 'content'")
    return message


def _utf8(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start}",
            expected="text in UTF-8",
            fix="convert it, for example with `iconv -f latin1 -t utf-8`, or leave it out",
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _json(file: Path, lines: bool) -> Iterator[Any]:
    text = _utf8(file)
    if lines:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _parsed(line, f"{file}, line {number}", "one JSON value per line")
    elif text.strip():
        found = _parsed(text, str(file), "JSON")
        yield from found if isinstance(found, list) else [found]


def _parsed(text: str, at: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{at} is not JSON: {error}", expected=expected) from error


def _parquet(file: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise InputError(
            f"{file} is Parquet, which needs the package pyarrow", fix="pip install pyarrow, or give JSON lines"
        ) from error
    for batch in parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()
