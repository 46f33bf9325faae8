"""Where a model argument points: a local folder, or a Hub id through huggingface_hub, whose cache is used as it is."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from moestro.core.errors import CheckpointError, MoestroError, StorageError, UnsupportedModel

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+|[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# Everything but the weights: configuration, index, tokenizer, chat templates, licence.
_SMALL = ["*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_INDEX = "model.safetensors.index.json"


def locate(model: str | Path) -> Path:
    """The folder of a model: an existing local one, or the Hub cache's snapshot, downloaded if needed.

    Raises CheckpointError, and UnsupportedModel for GGUF files.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and (found := sorted(file.name for file in path.glob("*.gguf"))):
            raise _gguf(f"{path} holds GGUF files such as {found[0]}")
        return path
    if path.suffix.lower() == ".gguf":
        raise _gguf(f"{path} is a GGUF file" if path.exists() else f"{path} names a GGUF file (there is none)")
    if path.exists():
        raise CheckpointError(
            f"{path} is a file", expected="a model folder with config.json and safetensors", fix="give the folder that holds it"
        )
    match = _HUB_ID.fullmatch(str(model))
    if isinstance(model, Path) or match is None or str(model).startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no folder {path}", expected="a local folder, `org/name` or `org/name@revision`", fix="check the path"
        )
    return _snapshot(str(model), match["name"], match["revision"])


def _snapshot(source: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The index first, then exactly the files it names: repositories carry further copies of the weights (original/, metal/).
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL, ignore_patterns=["*/*.json"]))
        weights = ["model.safetensors"]
        if (path / _INDEX).is_file():
            weights += _shards(path / _INDEX)
        path = Path(snapshot_download(name, revision=path.name, allow_patterns=weights))
        if not any((path / weight).exists() for weight in weights):
            _no_safetensors(source, name, path.name)
        return path
    except MoestroError:
        raise
    except Exception as error:  # the library raises its own, its HTTP client's and OSError
        _refuse(source, error)


def _no_safetensors(source: str, name: str, commit: str) -> NoReturn:
    from huggingface_hub import HfApi, constants

    offline = constants.HF_HUB_OFFLINE
    files = [] if offline else HfApi().list_repo_files(name, revision=commit)
    others = [f for f in files if f.endswith((".bin", ".pth", ".pt"))]
    if not others and (found := sorted(f for f in files if f.lower().endswith(".gguf"))):
        raise _gguf(f"{source} holds GGUF files such as {found[0]}")
    raise CheckpointError(
        f"{source} has no model.safetensors" + (f", only {others[0]}, a format that can run code when loaded" if others else ""),
        expected="a model's weights as safetensors",
        fix="unset HF_HUB_OFFLINE to download them" if offline else "look for a revision with safetensors, such as @refs/pr/1",
    )


def _gguf(found: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{found}, a format that moestro does not run",
        expected="a Hugging Face checkpoint, `org/name` or a folder with config.json and safetensors",
        fix="give the original model that the GGUF file was made from, or run the file with llama.cpp",
    )


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # Checkpoint.open reads the index again and says what is wrong with it


def _refuse(source: str, error: Any) -> NoReturn:
    from huggingface_hub import constants, errors

    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        raise StorageError(
            f"{source} cannot be stored under {constants.HF_HUB_CACHE}: {error.strerror}",
            fix="make room there, or point HF_HOME to another disk",
        ) from error
    if isinstance(error, errors.GatedRepoError):
        found, fix = f"{source} is gated", "accept its licence on the Hub and run `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        found, fix = f"{source} has no such revision on the Hub", "check what follows the @"
    elif isinstance(error, errors.RepositoryNotFoundError):
        found, fix = (
            f"there is no folder {source} and no such model on the Hub",
            "check the name; for a private model run `hf auth login`",
        )
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        found = f"there is no folder {source}, and it is neither in the Hub's cache ({constants.HF_HUB_CACHE}) nor can it be downloaded"
        fix = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else f"check the connection to {constants.ENDPOINT}"
    else:
        found, fix = f"{source} could not be fetched from the Hub: {said}", "check the name and the connection"
    raise CheckpointError(found, expected="a local folder, `org/name` or `org/name@revision`", fix=fix) from error
