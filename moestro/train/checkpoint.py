"""Checkpoints: weights, optimiser, objective and position as safetensors and JSON, each folder visible only when complete.

Data order and randomness are functions of the seed and the step, so seed and step are their whole state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moestro.core.errors import CheckpointError, StorageError

FORMAT = 1
FOLDER, MODEL, OPTIMISER, STATE = "checkpoints", "model.safetensors", "optimiser.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint on disk. step: optimiser steps done. state: what state.json holds."""

    folder: Path
    step: int
    state: dict[str, Any]


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter and saved buffer under `NAME.path`, once each: what is shared keeps its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        for path, value in module.state_dict(keep_vars=True).items():
            assert isinstance(value, Tensor), f"{path} keeps a state that is no tensor"
            if id(value) not in seen:
                seen.add(id(value))
                found[f"{name}.{path}"] = value
    return found


def save(
    folder: Path, step: int, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of a step beside the older ones, of which the newest stay (`keep` in all). Raises StorageError."""
    final = folder / FOLDER / f"step-{step:08}"
    partial = final.with_name(final.name + ".partial")
    tensors = tensors_of(modules)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial / MODEL)
        save_file(_optimiser_tensors(tensors, optimiser), partial / OPTIMISER)
        (partial / STATE).write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1) + "\n", encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"the checkpoint {final} cannot be written: {error}", fix="make room, then --resume") from error
    for old in _folders(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> Saved | None:
    """The newest complete checkpoint of a run, or None. Raises CheckpointError when it cannot be read."""
    found = _folders(folder)
    if not found:
        return None
    try:
        state = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"it has format {state['format']}, this version reads {FORMAT}")
        return Saved(found[-1], int(state["step"]), state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint {found[-1]} cannot be read: {error}", fix=f"remove it and resume: rm -r {found[-1]}"
        ) from error


def load(saved: Saved, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> None:
    """Put a checkpoint's values into modules and optimiser. Raises CheckpointError when they are of another configuration."""
    tensors = tensors_of(modules)
    try:
        weights, moments = load_file(saved.folder / MODEL), load_file(saved.folder / OPTIMISER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{saved.folder} cannot be read: {error}", fix=f"remove it and resume: rm -r {saved.folder}"
        ) from error
    wrong = [n for n in {*tensors, *weights} if n not in tensors or n not in weights or tensors[n].shape != weights[n].shape]
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{saved.folder} is of another model: {len(wrong)} tensors differ, the first is {name} "
            f"({_shape(weights.get(name))} in the file, {_shape(tensors.get(name))} in the model)",
            expected="a checkpoint of the same configuration",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
    for key, value in moments.items():
        name, _, field = key.rpartition("/")
        optimiser.state[tensors[name]][field] = value


def _optimiser_tensors(tensors: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {
        f"{names[id(parameter)]}/{field}": value.detach().contiguous()
        for parameter, fields in optimiser.state.items()
        for field, value in fields.items()
    }


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / FOLDER).glob("step-*") if _NAME.fullmatch(path.name))


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
