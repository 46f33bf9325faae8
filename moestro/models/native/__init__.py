"""Descriptions of decoders without torch: which tensors and numbers make each layer, for the families that the native trunk runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from moestro.core.errors import CheckpointError, UnsupportedModel
from moestro.models.checkpoint import Checkpoint
from moestro.models.families import settings_of
from moestro.models.families.settings import Settings
from moestro.models.layout import Layout
from moestro.models.native.decoder import Decoder
from moestro.models.native.names import Names

MODULES = ("softmax", "granite", "deepseek", "gpt_oss")
ROUTERS = {("softmax", "probs"), ("sigmoid", "probs"), ("logits", "softmax_after")}  # what native.router computes

Family = Callable[[Settings, Names], Decoder]


def describe(checkpoint: Checkpoint, layout: Layout) -> Decoder:
    """The checkpoint's decoder; reads no weight.

    Raises:
        UnsupportedModel: a family, a rotary embedding or a router that the native trunk does not compute.
        CheckpointError: a tensor is missing, left over or of another shape than the configuration says.
    """
    settings = settings_of(checkpoint)
    family = families().get(settings.model_type)
    if family is None:
        raise UnsupportedModel(f"the native trunk has no {settings.model_type}", expected=", ".join(families()))
    for layer in layout.facts.layers:
        if (layer.router.score, layer.router.weights) not in ROUTERS or layer.spec.weigh_input:
            raise UnsupportedModel(f"the native trunk has no router with {layer.router.score} and {layer.router.weights}")
    return family(settings, Names(checkpoint, layout, settings))


def native_supported(checkpoint: Checkpoint, layout: Layout, dtype: str = "auto") -> str | None:
    """Why the native trunk cannot run this checkpoint, or None when it can. Reads no weight.

    dtype: as asked for the trunk; weights are kept as stored, so a dtype that would round them is a reason too.
    """
    if dtype not in ("auto", "float32", layout.facts.dtype):
        return f"the weights are {layout.facts.dtype} and {dtype} is asked for"
    try:
        describe(checkpoint, layout)
    except (UnsupportedModel, CheckpointError) as error:
        return error.found
    return None


def families() -> Mapping[str, Family]:
    """Model types to the functions that describe them."""
    return {
        name: function
        for module in MODULES
        for name, function in importlib.import_module(f"moestro.models.native.{module}").FAMILIES.items()
    }
