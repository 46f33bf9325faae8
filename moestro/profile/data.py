"""Text to profile with: files, folders, JSON lines, chats and Hub data sets, cut into labelled sequences of tokens.

The same data gives the same sequences every time: files by name, documents in order, pieces from the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moestro.core.errors import InputError
from moestro.profile.sources import Document

PARTS = ("prompt", "answer")
MOST_LABELS = 256


class Encoder(Protocol):
    """What is needed of a tokenizer (moestro.models.tokenizer.Tokenizer)."""

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...

    def decode(self, ids: Any, skip_special: bool = True) -> str: ...

    def chat(self, messages: Any, add_generation_prompt: bool = True, **options: Any) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that are read together. tokens_T: int32. labels_T: int16, numbers of labels. counted_T: bool, False for mere context.

    document: number of the document it is cut from. start: its first token's position there.
    """

    tokens_T: np.ndarray
    labels_T: np.ndarray
    counted_T: np.ndarray
    document: int
    start: int


@dataclass(frozen=True, slots=True)
class Texts:
    """Everything to be read, in order. labels: their names. characters_G: of the counted tokens of each label.

    digest: of every token, label and mask. sources: what it was made from, for people.
    """

    sequences: tuple[Piece, ...]
    labels: tuple[str, ...]
    characters_G: tuple[int, ...]
    digest: str
    sources: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def tokens(self) -> int:
        """Counted tokens."""
        return sum(int(s.counted_T.sum()) for s in self.sequences)

    def frequent(self) -> np.ndarray:
        """Ids of the counted tokens, most frequent first, ties by id."""
        ids, counts = np.unique(np.concatenate([s.tokens_T[s.counted_T] for s in self.sequences]), return_counts=True)
        return ids[np.argsort(-counts, kind="stable")]


def cut(
    documents: Iterator[Document] | Sequence[Document],
    tokenizer: Encoder | None,
    *,
    length: int = 512,
    stride: int | None = None,
    tokens: int | None = None,
    part: str = "all",
    by_part: bool = False,
) -> Texts:
    """Documents as sequences.

    Args:
        length: tokens of a sequence at most; a document's last piece may be shorter.
        stride: new tokens per sequence; the others repeat the end of the one before as context and are not counted.
        tokens: tokens taken at most, the same number of each label, from its first documents.
        part: 'all', or of chats only the 'prompt' or the 'answer' is counted, the rest is context.
        by_part: the labels are 'prompt' and 'answer' instead of the documents' own.

    Raises:
        InputError: no text, more than 256 labels, an option out of range, or a chat whose parts cannot be told apart.
    """
    stride = stride or length
    if length < 2 or not 1 <= stride <= length:
        raise InputError(f"sequences of {length} tokens with a stride of {stride}", expected="2 or more, and a stride up to that")
    if part not in ("all", *PARTS):
        raise InputError(f"part is {part!r}", expected="all, prompt or answer")
    documents = list(documents)
    names: list[str] = list(PARTS) if by_part else sorted({d.label for d in documents})
    if len(names) > MOST_LABELS:
        raise InputError(
            f"the data has {len(names)} labels, such as {names[0]} and {names[1]}",
            expected=f"{MOST_LABELS} or fewer",
            fix="use --label folder, column:NAME or none",
        )
    left = (
        {name: tokens // max(1, len({d.label for d in documents})) for name in {d.label for d in documents}} if tokens else None
    )
    out: list[Piece] = []
    characters = [0] * len(names)
    for number, document in enumerate(documents):
        if left is not None and left[document.label] <= 0:
            continue
        ids, answer_T = _tokens(document, tokenizer, parts=part != "all" or by_part)
        whole = left is None or len(ids) <= left[document.label]
        if left is not None:
            ids = ids[: left[document.label]]
            left[document.label] -= len(ids)
        tokens_T = np.asarray(ids, np.int32)
        answer_T = answer_T[: len(ids)]
        counted_T = np.ones(len(ids), bool) if part == "all" else answer_T == (part == "answer")
        labels_T = answer_T.astype(np.int16) if by_part else np.full(len(ids), names.index(document.label), np.int16)
        for label in np.unique(labels_T[counted_T]).tolist():
            kept_T = counted_T & (labels_T == label)
            plain = whole and bool(kept_T.all()) and document.text is not None
            characters[label] += len(document.text or "") if plain else _characters(tokenizer, tokens_T[kept_T])
        out += [s for s in _pieces(tokens_T, labels_T, counted_T, number, length, stride) if s.counted_T.any()]
    if not out:
        raise InputError(
            "there is no text to profile with"
            + (f": no {part} in {len(documents)} documents" if part != "all" and documents else ""),
            expected="at least one document with one token",
            fix="check the files and --text-column",
        )
    sources: dict[str, int] = {}
    for document in documents:
        sources[document.source] = sources.get(document.source, 0) + 1
    told = tuple({"source": name, "documents": n} for name, n in sources.items())
    return Texts(tuple(out), tuple(names), tuple(characters), digest_of(out, names), told)


def digest_of(sequences: Sequence[Piece], labels: Sequence[str]) -> str:
    """SHA-256 of all that decides what is counted."""
    said = hashlib.sha256(json.dumps(list(labels)).encode())
    for s in sequences:
        said.update(len(s.tokens_T).to_bytes(8, "little"))
        for array in (s.tokens_T, s.labels_T, s.counted_T):
            said.update(np.ascontiguousarray(array).tobytes())
    return said.hexdigest()


def _pieces(
    tokens_T: np.ndarray, labels_T: np.ndarray, counted_T: np.ndarray, document: int, length: int, stride: int
) -> Iterator[Piece]:
    done = 0
    while done < len(tokens_T):
        start = max(0, done - (length - stride))
        stop = min(len(tokens_T), start + length)
        new_T = counted_T[start:stop].copy()
        new_T[: done - start] = False
        yield Piece(tokens_T[start:stop], labels_T[start:stop], new_T, document, start)
        done = stop


def _characters(tokenizer: Encoder | None, ids_T: np.ndarray) -> int:
    return 0 if tokenizer is None else len(tokenizer.decode(ids_T.tolist()))


def _tokens(document: Document, tokenizer: Encoder | None, parts: bool) -> tuple[list[int], np.ndarray]:
    """Token ids, and True for those of a chat's answers."""
    if document.tokens is not None:
        return list(document.tokens), np.zeros(len(document.tokens), bool)
    if tokenizer is None:
        raise InputError(
            f"{document.source} holds text and the model has no tokenizer",
            expected="lines of JSON with a list of token ids under 'tokens'",
            fix="copy tokenizer.json from the model this one was made of",
        )
    if document.messages is None:
        ids = tokenizer.encode(document.text or "") if document.text else []
        return ids, np.zeros(len(ids), bool)
    ids = tokenizer.chat(document.messages, add_generation_prompt=False)
    answer_T = np.zeros(len(ids), bool)
    if parts:
        for i, message in enumerate(document.messages):
            if message.get("role") != "assistant":
                continue
            before = tokenizer.chat(document.messages[:i], add_generation_prompt=True)
            after = tokenizer.chat(document.messages[: i + 1], add_generation_prompt=False)
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise InputError(
                    f"{document.source}: the chat template does not write a longer chat as a continuation of a shorter one",
                    expected="a template under which prompt and answer can be told apart",
                    fix="profile without --part and --label part",
                )
            answer_T[len(before) : len(after)] = True
    return ids, answer_T
