"""Facts of each block family: names, shapes and router arithmetic. Torch is imported only for classes without a family file."""

from __future__ import annotations

import importlib
from types import ModuleType

from moestro.core.errors import UnsupportedModel
from moestro.models.checkpoint import Checkpoint
from moestro.models.families.block import layout
from moestro.models.families.settings import Settings, plain
from moestro.models.layout import Layout

BLOCKS = ("softmax", "deepseek", "gpt_oss", "granite", "phi", "llama4", "lfm2", "ernie", "minimax")


def describe(checkpoint: Checkpoint) -> Layout:
    """What the checkpoint is and where each of its weights lies.

    Raises:
        UnsupportedModel: not a Mixture-of-Experts model, or one that moestro cannot run with parity.
        CheckpointError: the configuration and the tensors disagree, or something is missing.
    """
    settings = settings_of(checkpoint)
    family = family_of(settings.model_type)
    if family is None:
        from moestro.models.families.structural import describe as from_structure

        return from_structure(checkpoint, settings)
    return layout(checkpoint, settings, family.block(settings))


def settings_of(checkpoint: Checkpoint) -> Settings:
    """The text model's configuration: the `text_config` of a multimodal model, else all of it. Raises UnsupportedModel."""
    config = checkpoint.config
    inner = config.get("text_config")
    if isinstance(inner, dict):
        above = {k: config[k] for k in ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings") if k in config}
        config = above | inner
    where = str(checkpoint.path / "config.json")
    if not config.get("model_type"):
        raise UnsupportedModel(f"{where} does not say its model_type", expected="a transformers model")
    return Settings(plain(config), where)


def known() -> tuple[str, ...]:
    """The model types that have a family file."""
    return tuple(t for name in BLOCKS for t in importlib.import_module(f"moestro.models.families.{name}").MODEL_TYPES)


def family_of(model_type: str) -> ModuleType | None:
    """The module that describes this model type, or None."""
    for name in BLOCKS:
        module = importlib.import_module(f"moestro.models.families.{name}")
        if model_type in module.MODEL_TYPES:
            return module
    return None
