"""A run from its configuration: prepare the text, build the model, train, keep the result. What the command line calls."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moestro.core.errors import CheckpointError, InputError, StorageError
from moestro.layers.decoder import build
from moestro.train.config import CHANGEABLE, TrainConfig, differences
from moestro.train.data.stream import Stream
from moestro.train.data.text import read
from moestro.train.data.tokens import Tokens, open_tokens, prepare
from moestro.train.loop import Loop, Report
from moestro.train.objective import make
from moestro.train.parallel import Group

CONFIG, TOKENS, MODEL = "train.json", "tokens", "model"


def start(config: TrainConfig, folder: Path, group: Group, report: Report | None = None) -> Loop:
    """A new run in `folder`. Raises InputError for text or configuration that cannot be, StorageError when a run is there."""
    if group.first:
        if (folder / CONFIG).exists():
            raise StorageError(
                f"{folder} holds a run already",
                expected="a new folder",
                fix=f"moestro train --resume {folder}, or another --output",
            )
        if not config.data.sources:
            raise InputError(
                "no text is given", expected="files, folders, installed[:DOMAIN] or hub:org/name", fix="--data WHERE"
            )
        documents = (
            row
            for spec in config.data.sources
            for row in read(spec, field=config.data.text_field, domain_field=config.data.domain_field)
        )
        prepare(documents, config.data.tokenizer, folder / TOKENS)
    group.wait()
    loop = _loop(config, open_tokens(folder / TOKENS), folder, group, report)
    if group.first:
        _write(config, folder)  # last: what failed before can be started again
    return loop


def reopen(
    folder: Path,
    group: Group,
    report: Report | None = None,
    change: Callable[[dict[str, Any]], TrainConfig] = TrainConfig.from_json,
) -> Loop:
    """The run in `folder`, after its newest checkpoint. change: from the saved configuration to the one to go on with.

    Raises CheckpointError when there is no run, when it cannot be read, or when its configuration is another one.
    """
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        saved = TrainConfig.from_json(data)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no run in {folder}", expected=f"a folder with {CONFIG}", fix="start one: moestro train CONFIG"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    config = change(data)
    if others := differences(saved, config):
        raise CheckpointError(
            f"the run in {folder} has another configuration: {', '.join(others)}",
            expected="the same settings; only " + ", ".join(CHANGEABLE) + " may change",
            fix="start a new run with another --output",
        )
    loop = _loop(config, open_tokens(folder / TOKENS), folder, group, report)
    loop.resume()
    if group.first and config != saved:
        _write(config, folder)
    return loop


def _loop(config: TrainConfig, tokens: Tokens, folder: Path, group: Group, report: Report | None) -> Loop:
    if config.model.vocabulary < tokens.vocabulary:
        raise InputError(
            f"the model has a vocabulary of {config.model.vocabulary}",
            expected=f"{tokens.vocabulary} or more, the tokenizer's",
            fix="leave model.vocabulary out",
        )
    micro_batch, _ = config.micro(group.size)
    data = config.data
    stream = Stream(
        tokens,
        length=data.length,
        holdout=data.holdout,
        weights=data.weights,
        seed=config.seed,
        group=micro_batch if data.pure else 1,
        documents=data.mask_documents,
    )
    objective = make(config.objective, "objective")
    phases = [make(part, "training schedule") for part in config.phases]
    return Loop(config, build(config.model), stream, folder, objective=objective, phases=phases, group=group, report=report)


def _write(config: TrainConfig, folder: Path) -> None:
    partial = folder / f"{CONFIG}.partial"
    try:
        partial.write_text(json.dumps(config.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG)
    except OSError as error:
        raise StorageError(f"cannot write {folder / CONFIG}: {error}", fix="choose another --output") from error


@contextmanager
def locked(folder: Path, group: Group, *, new: bool) -> Iterator[None]:
    """Hold a run's folder; a new run makes it. Raises CheckpointError when there is none, StorageError when another process trains in it."""
    if not group.first:
        yield
        return
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no run in {folder}", fix="start one: moestro train CONFIG --output FOLDER") from error
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}", fix="choose another --output") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"another process trains in {folder}", fix="wait for it, or choose another --output") from error
        yield
    finally:
        os.close(handle)


def check_export(loop: Loop, families: Sequence[str]) -> None:
    """Write the untrained model as each family and throw it away, so that a refusal comes before the training. Raises UnsupportedModel."""
    if families and loop.group.first:
        from moestro.models.trained_export import export

        with tempfile.TemporaryDirectory(dir=loop.folder) as place:
            for i, family in enumerate(families):
                export(loop.module, Path(place) / str(i), family, verify=False)


def keep(loop: Loop, families: Sequence[str] = ()) -> dict[str, Any]:
    """Write the trained model with its tokenizer as MODEL/ in the run's folder, and beside it each export; says where.

    families: Hugging Face families, or 'auto'. Raises StorageError, UnsupportedModel, and CheckpointError when transformers computes
    other logits.
    """
    from moestro.models.trained import save_trained
    from moestro.models.trained_export import export

    loop.module.eval()
    save_trained(loop.module, loop.folder / MODEL, overwrite=True)
    places = {family: loop.folder / family for family in families}
    for family, place in places.items():
        export(loop.module, place, family, overwrite=True)
    for place in (loop.folder / MODEL, *places.values()):
        loop.stream.tokens.save_tokenizer(place)
    return {
        "model": str(loop.folder / MODEL),
        "exported": {family: str(place) for family, place in places.items()},
        "parameters": sum(p.numel() for p in loop.parameters),
    }
