"""Text made into one file of token ids per domain, once; training maps these files, and a resumed run needs nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from moestro.core.errors import CheckpointError, InputError, StorageError
from moestro.models.hub import locate
from moestro.models.tokenizer import Tokenizer
from moestro.models.writer import COMPANIONS
from moestro.train.data import bytes as byte_tokens

INDEX = "index.json"
Encode = Callable[[str], np.ndarray]
MOST_DOMAINS = 256


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain's text. tokens: ids, document ends included. bytes: of UTF-8 text. digest: sha256 of the ids as stored."""

    name: str
    tokens: int
    bytes: int
    documents: int
    digest: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Prepared text: ids_N of each domain, mapped from disk. vocabulary: number of ids the tokenizer has; end: the id that ends a document."""

    folder: Path
    domains: tuple[Domain, ...]
    ids: tuple[np.ndarray, ...]
    vocabulary: int
    end: int

    @property
    def digest(self) -> str:
        """Of all ids, in the order of the domains."""
        return hashlib.sha256("".join(d.name + d.digest for d in self.domains).encode()).hexdigest()

    def save_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files into a model folder."""
        for file in self.folder.iterdir():
            if not file.name.startswith("domain-") and file.name != INDEX:
                shutil.copyfile(file, folder / file.name)


def vocabulary_of(tokenizer: str) -> int:
    """Number of ids of a tokenizer as `prepare` takes it. Raises CheckpointError."""
    return _codec(tokenizer)[1]


def prepare(documents: Iterable[tuple[str, str]], tokenizer: str, folder: Path) -> Tokens:
    """Tokenise (domain, text) documents into `folder`, which appears complete or not at all.

    tokenizer: 'bytes', or a folder or Hub id with a tokenizer.json. Each document is followed by the tokenizer's end token.
    Raises InputError when there is no text, CheckpointError for the tokenizer, StorageError.
    """
    encode, vocabulary, end, save = _codec(tokenizer)
    kind = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        domains = _write(documents, encode, kind, end, partial)
        if not domains:
            raise InputError("the data has no text", expected="at least one document that is not empty", fix="check --data")
        save(partial)
        index = {"vocabulary": vocabulary, "end": end, "dtype": kind.str, "domains": [asdict(d) for d in domains]}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise StorageError(f"the tokens cannot be written to {folder}: {error}", fix="choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_tokens(folder)


def open_tokens(folder: Path) -> Tokens:
    """Tokens prepared before. Raises CheckpointError when files are missing or of another length than the index says."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        domains = tuple(Domain(**row) for row in index["domains"])
        kind = np.dtype(index["dtype"])
        ids = tuple(np.memmap(folder / _file(i), kind, "r") for i in range(len(domains)))
        vocabulary, end = int(index["vocabulary"]), int(index["end"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the prepared text in {folder} cannot be read: {error}", fix="start the run again") from error
    for domain, found in zip(domains, ids, strict=True):
        if found.shape[0] != domain.tokens:
            raise CheckpointError(
                f"{folder} has {found.shape[0]} tokens of {domain.name}", expected=f"{domain.tokens}", fix="start the run again"
            )
    return Tokens(folder, domains, ids, vocabulary, end)


def _file(number: int) -> str:
    return f"domain-{number:03}.bin"


def _write(documents: Iterable[tuple[str, str]], encode: Encode, kind: np.dtype, end: int, folder: Path) -> list[Domain]:
    files: dict[str, IO[bytes]] = {}
    made: dict[str, Domain] = {}
    digests: dict[str, Any] = {}
    try:
        for name, text in documents:
            if name not in files:
                if len(files) == MOST_DOMAINS:
                    raise InputError(f"the data has more than {MOST_DOMAINS} domains", fix="name them: --data DOMAIN=WHERE")
                files[name] = open(folder / _file(len(files)), "wb")  # noqa: SIM115 (closed below)
                made[name], digests[name] = Domain(name, 0, 0, 0, ""), hashlib.sha256()
            ids = np.append(encode(text), end).astype(kind)
            files[name].write(ids.tobytes())
            digests[name].update(ids.tobytes())
            old, size = made[name], len(text.encode("utf-8", "replace"))
            made[name] = Domain(name, old.tokens + len(ids), old.bytes + size, old.documents + 1, "")
    finally:
        for file in files.values():
            file.close()
    return [replace(domain, digest=digests[name].hexdigest()) for name, domain in made.items()]


def _codec(tokenizer: str) -> tuple[Encode, int, int, Callable[[Path], None]]:
    """(text to ids, vocabulary, end token, writer of its files)."""
    if tokenizer == "bytes":
        return byte_tokens.encode, byte_tokens.SIZE, byte_tokens.END, byte_tokens.save
    return _files(tokenizer)


def _files(source: str) -> tuple[Encode, int, int, Callable[[Path], None]]:
    folder = locate(source)
    tokenizer = Tokenizer.open(folder)
    ends = [
        i
        for token in ("eos_token", "sep_token", "bos_token")
        if (i := tokenizer.token_id(tokenizer.special.get(token, ""))) is not None
    ]
    end = (tokenizer.eos_ids or tuple(ends) or (None,))[0]
    if end is None:
        raise CheckpointError(
            f"the tokenizer of {source} has no token that ends a text", expected="an eos_token in tokenizer_config.json"
        )

    def save(target: Path) -> None:
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                if file.name != "generation_config.json" and file.parent == folder:
                    shutil.copyfile(file, target / file.name)

    return lambda text: np.asarray(tokenizer.encode(text, add_special=False), np.int64), max(tokenizer.size, end + 1), end, save
