"""Which words on the command line are the model and which the prompt, and prompts from standard input or a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from moestro.cli.errors import bad_argument

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def is_model(word: str) -> bool:
    """Whether a word alone names a model: a Hub id, or something written like a path or a weights file. Prompts have spaces or no slash."""
    path = Path(word).expanduser()
    if path.suffix.lower() in (".gguf", ".safetensors") and (path.is_file() or not re.search(r"\s", word)):
        return True  # to be refused by name, never answered as a prompt
    return bool(_HUB_ID.fullmatch(word)) or path.is_dir() or bool(re.match(r"(\.{0,2}/|~)\S*$", word))


def model_and_prompt(words: list[str], option: str | None) -> tuple[str | None, str | None]:
    """(model or None for the embedded one, prompt or None for standard input or a chat). Raises InputError."""
    if len(words) > 2 or (len(words) == 2 and option is not None):
        bad_argument(
            f"{len(words) + (option is not None)} arguments: {' '.join(words)}",
            "a model and a prompt",
            "put the prompt in quotes",
        )
    if len(words) == 2:
        return words[0], words[1]
    if option is not None:
        return (words[0] if words else None), option
    if words and words[0] != "-" and is_model(words[0]):
        return words[0], None
    return None, (words[0] if words else None)


def decoded(raw: bytes, source: str) -> str:
    """UTF-8 text that is not empty. Raises InputError."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_argument(
            f"{source} is not UTF-8: byte {raw[error.start]:#04x} at position {error.start}",
            "text in UTF-8",
            "convert it, for example with `iconv -f latin1 -t utf-8`",
        )
    if not text.strip():
        bad_argument(f"{source} is empty", "a prompt")
    return text


def from_stdin() -> str:
    """Everything on standard input, without the newline that ends it. Raises InputError."""
    return decoded(sys.stdin.buffer.read(), "standard input").removesuffix("\n")


def from_file(path: Path) -> list[str]:
    """One prompt per line; empty lines are left out. Raises InputError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        bad_argument(f"{path} cannot be read: {error.strerror}", "a text file with one prompt per line")
    return [line for line in decoded(raw, str(path)).splitlines() if line.strip()]
