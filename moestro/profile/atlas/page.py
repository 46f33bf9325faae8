"""One HTML file that needs nothing else: style, programme and data inside, no network, nothing in the data taken for markup."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from moestro.core.errors import StorageError

SCRIPTS = ("base", "chart", "map", "expert", "flow", "text", "labels", "cache", "notes", "start")


def page(data: Mapping[str, Any]) -> str:
    """The page. data: from `contents`."""
    folder = files("moestro.profile.atlas") / "page"
    parts = {
        "STYLE": (folder / "style.css").read_text("utf-8"),
        "SCRIPT": "\n".join((folder / f"{name}.js").read_text("utf-8") for name in SCRIPTS),
        "DATA": as_script(data),
    }
    shell = (folder / "page.html").read_text("utf-8")
    pieces = []
    while shell:
        before, mark, rest = shell.partition("/*{")
        pieces.append(before)
        name, _, shell = rest.partition("}*/")
        pieces.append(parts[name] if mark else "")
    return "".join(pieces)


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, nor hold half a character."""
    told = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    told = told.encode("utf-8", "replace").decode()
    for sign in "<>&\u2028\u2029":
        told = told.replace(sign, f"\\u{ord(sign):04x}")
    return told


def write(data: Mapping[str, Any], path: str | Path) -> int:
    """Write the page through a temporary name; returns its bytes. Raises StorageError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    raw = page(data).encode()
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(raw)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write the atlas {path}: {error}", fix="choose another file for --html") from error
    return len(raw)
