"""The same model with another number of experts, or narrower ones: the configuration that says so, and which tensors are a router's.

Source: transformers 5.23 configuration classes; families differ only in the names of these numbers.
"""

from __future__ import annotations

import re
from typing import Any

from moestro.core.errors import UnsupportedModel
from moestro.core.layer import ModelFacts
from moestro.models.checkpoint import Checkpoint
from moestro.models.layout import Layout

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
WIDTHS = ("moe_intermediate_size", "intermediate_size")
SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size")
PREDICTIONS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts")
# On disk and in memory: weights and biases of the map to logits, and biases of the choice.
_ROUTER = re.compile(
    r"\.(?:gate|router)\.(?:wg\.|layer\.)?(?:weight|bias)$|[._](?:e_score_correction_bias|expert_bias)$|\.moe_statics\.\w+$"
)


def is_router(name: str) -> bool:
    """Whether a tensor of a MoE layer has one entry per expert because it belongs to the router."""
    return _ROUTER.search(name) is not None


def router_tensors(checkpoint: Checkpoint, layout: Layout, ordinal: int) -> tuple[str, ...]:
    """The tensors of one layer's router, on disk. Raises UnsupportedModel when they are not recognised."""
    facts = layout.facts.layers[ordinal]
    at = re.compile(rf"(?:^|\.)layers\.{facts.index}\.")
    found = tuple(name for name in layout.trunk if at.search(name) and is_router(name))
    for name in found:
        expert_axis(checkpoint.tensors[name].shape, facts.num_experts, name)
    if not any(len(checkpoint.tensors[name].shape) == 2 for name in found):
        raise UnsupportedModel(
            f"the router of decoder layer {facts.index} has no name that is known",
            expected="gate.weight or router.weight",
            fix="use a family that `moestro inspect` lists",
        )
    return found


def expert_axis(shape: tuple[int, ...], experts: int, name: str) -> int:
    """The axis of a router's tensor along which its experts lie. Raises UnsupportedModel without one."""
    axes = [axis for axis in (0, 1) if axis < len(shape) and shape[axis] == experts and (axis == 0 or shape[0] == 1)]
    if not axes:
        raise UnsupportedModel(f"{name} has shape {list(shape)}", expected=f"{experts} rows, one for each expert")
    return axes[0]


def resized(config: dict[str, Any], facts: ModelFacts, *, experts: int, d_expert: int) -> dict[str, Any]:
    """A config.json with these numbers in the place of the old ones. Raises UnsupportedModel when it cannot say them."""
    nested = isinstance(config.get("text_config"), dict)
    inner = dict(config["text_config"] if nested else config)
    layer = facts.layers[0]
    if experts != layer.num_experts:
        names = [name for name in COUNTS if inner.get(name) is not None]
        if not names:
            raise UnsupportedModel(
                f"the configuration of this {facts.family} does not say how many experts there are",
                expected="one of " + ", ".join(COUNTS),
            )
        for name in names:
            inner[name] = [experts] * len(inner[name]) if isinstance(inner[name], list) else experts
    if d_expert != layer.spec.d_expert:
        _narrow(inner, facts, d_expert)
    return config | {"text_config": inner} if nested else inner


def without_predictions(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that promises no layers for multi-token prediction any more."""
    return {
        name: without_predictions(value) if name == "text_config" else 0 if name in PREDICTIONS else value
        for name, value in config.items()
    }


def _narrow(config: dict[str, Any], facts: ModelFacts, d_expert: int) -> None:
    layer = facts.layers[0]
    name = next((n for n in WIDTHS if config.get(n) == layer.spec.d_expert), "")
    if not name:
        raise UnsupportedModel(
            f"the configuration of this {facts.family} does not say how wide experts are", expected=" or ".join(WIDTHS)
        )
    dense = len(facts.layers) < facts.decoder_layers
    if name == "intermediate_size" and dense:
        raise UnsupportedModel(
            f"in a {facts.family} one number says how wide experts and dense layers are", fix="remove experts instead of neurons"
        )
    if layer.shared and not any(config.get(n) is not None for n in SHARED_WIDTHS):
        counted = next((n for n in SHARED_COUNTS if config.get(n) is not None), "")
        if not counted or layer.shared % d_expert:
            raise UnsupportedModel(
                f"in a {facts.family} the shared experts are as wide as a whole number of experts, {layer.shared} in all",
                expected=f"a width that divides {layer.shared}" if counted else "experts of their old width",
                fix="keep another number of neurons, or remove experts instead",
            )
        config[counted] = layer.shared // d_expert
    config[name] = d_expert
