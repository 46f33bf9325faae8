"""Models built by `moestro.layers`: saved as safetensors with a config.json, loaded back by the same code. Needs torch.

config.json has one key, 'moestro': the format's number, the `MoEConfig`, each router's combine convention in words (checked when
loading: a change of code must not change numbers silently) and the tensors that are one weight under several names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import CheckpointError
from moestro.models.checkpoint import Checkpoint, check_finite
from moestro.models.writer import CheckpointWriter

if TYPE_CHECKING:
    import torch
    from torch import nn

KEY, FORMAT = "moestro", 1


def is_trained(checkpoint: Checkpoint) -> bool:
    """Whether the folder was written by `save_trained`."""
    return isinstance(checkpoint.config.get(KEY), dict)


def save_trained(module: nn.Module, folder: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> Checkpoint:
    """Write a model that `layers.decoder.build` made. dtype: of its floating parameters; buffers keep their own.

    Raises StorageError when the folder cannot be written or is in the way.
    """
    state, aliases = _once(module)
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    config = {
        KEY: {
            "format": FORMAT,
            "config": module.config.to_json(),  # type: ignore[union-attr,operator]
            "conventions": _conventions(module),
            "aliases": aliases,
        }
    }
    with CheckpointWriter(folder, config, overwrite=overwrite) as writer:
        for name in sorted(state):
            array, kind = as_array(state[name], dtype if name in parameters else "")
            writer.add(name, array, kind)
        return writer.finish()


def load_trained(model: str | Path | Checkpoint) -> nn.Module:
    """The model in evaluation mode, float32 parameters.

    Raises CheckpointError: another format, tensors missing, left over or of another shape, NaN, or a router whose weights this version
    makes by another convention. InputError: a configuration that cannot be.
    """
    from moestro.layers.config import MoEConfig
    from moestro.layers.decoder import build

    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    if not is_trained(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} was not written by moestro's training", expected="a config.json with the key 'moestro'"
        )
    meta = checkpoint.config[KEY]
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoint.path} has format {meta.get('format')}",
            expected=str(FORMAT),
            fix="use the version of moestro that wrote it",
        )
    module = build(MoEConfig.from_json(meta["config"]))
    if (found := _conventions(module)) != meta["conventions"]:
        raise CheckpointError(
            f"this version weighs experts by {found}, the checkpoint was trained with {meta['conventions']}",
            fix="use the version of moestro that wrote it",
        )
    read_into(module, checkpoint, meta["aliases"])
    return module.eval()


def read_into(module: nn.Module, checkpoint: Checkpoint, aliases: dict[str, str] | None = None) -> None:
    """Fill every parameter and buffer from a checkpoint's tensors. Raises CheckpointError when they do not fit one to one."""
    import torch

    state, own = _once(module)
    if aliases is not None and own != aliases:
        raise CheckpointError(f"{checkpoint.path} shares other weights between layers than its configuration builds")
    missing, left = sorted(set(state) - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - set(state))
    if missing or left:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} tensors and has {len(left)} too many, such as {(missing + left)[0]}",
            expected="the tensors of its configuration and no others",
            fix="use the config.json and the weights of one run",
        )
    with torch.no_grad():
        for name, target in state.items():
            value = as_tensor(checkpoint.read(name), checkpoint.ref(name).dtype, name)
            if value.shape != target.shape:
                raise CheckpointError(
                    f"{name} has shape {list(value.shape)}",
                    expected=str(list(target.shape)),
                    fix="use the config.json that belongs to the weights",
                )
            target.copy_(value)


def as_array(tensor: torch.Tensor, dtype: str = "") -> tuple[np.ndarray, str | None]:
    """A contiguous numpy array and the safetensors name of its type where numpy has none. dtype: converts floating tensors."""
    import torch

    tensor = tensor.detach().cpu()
    if dtype and tensor.is_floating_point():
        tensor = tensor.to(getattr(torch, dtype))
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy(), "BF16"
    return np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape), None


def as_tensor(array: np.ndarray, dtype: str, name: str) -> torch.Tensor:
    """The torch tensor of what `Checkpoint.read` gave. Raises CheckpointError when a BF16 or 16-bit weight is not finite."""
    import torch

    if dtype in ("BF16", "F16", "F32", "F64"):
        check_finite(array, name)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def _once(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state with each tensor once, under its first name, and the other names with the first."""
    first: dict[int, str] = {}
    state: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if (known := first.setdefault(id(tensor), name)) == name:
            state[name] = tensor.detach()
        else:
            aliases[name] = known
    return state, aliases


def _conventions(module: nn.Module) -> dict[str, Any]:
    """How each router makes its weights, by the router's place in the model."""
    from moestro.layers.router import StagedRouter

    return {name: m.convention for name, m in module.named_modules() if isinstance(m, StagedRouter)}
