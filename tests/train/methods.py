"""Training configurations with one method each in them, for every trainable method of the catalogue."""

from __future__ import annotations

from typing import Any

from moestro.core.method import catalogue, load
from moestro.layers.config import MoEConfig
from moestro.layers.decoder import site_of

MODEL = {"d_model": 16, "layers": 2, "heads": 2, "num_experts": 4, "top_k": 2, "d_expert": 8}
KINDS = ("router", "loss", "tap", "experts", "mixer", "block", "architecture", "objective", "training schedule")
ROWS = {row["name"]: row for row in catalogue() if row["kind"] in KINDS}
DIGITS = {"length": 66, "holdout": 0.2}
LETTERS = [ord("a"), ord("m")]  # taken for an image
# What a method asks for beyond its own name, as its recipe does.
ALSO: dict[str, dict[str, Any]] = {
    "layers.architectures.dit": {"objective": "rectified_flow", "data": DIGITS},
    "train.objectives.rectified_flow": {"model": {"architecture": "dit"}, "data": DIGITS},
    "train.objectives.label": {"model": {"architecture": "encoder"}, "data": DIGITS},
    "layers.architectures.modality": {"model": {"architecture": {"name": "modality", "image": LETTERS}}},
    "layers.routers.moiie": {"model": {"router": {"name": "moiie", "image": LETTERS}}},
    "layers.routers.tasks": {"model": {"router": {"name": "tasks", "tasks": 3}}},
    "train.objectives.consistency": {"model": {"router": "thor"}},
    "train.objectives.adaptive": {"model": {"router": "blockffn"}},
    "train.objectives.mixed_denoising": {"model": {"vocabulary": 273}, "objective": {"name": "mixed_denoising", "marks": 16}},
    "train.phases.diversify": {"model": {"taps": ["single_expert"]}},
    "train.phases.freeze_routing": {"model": {"router": "stable_moe"}},
}


def settings(name: str) -> dict[str, Any]:
    """The training configuration with this method in it."""
    also, short, kind = ALSO.get(name, {}), name.rsplit(".", 1)[-1], ROWS[name]["kind"]
    found: dict[str, Any] = {"steps": 6, "batch": 4, "optimiser": {"rate": 0.02, "decay": 0.0}, **also}
    model = dict(also.get("model", {}))
    if kind == "objective":
        found.setdefault("objective", short)
    elif kind == "training schedule":
        found["phases"] = [short]
    elif kind in ("loss", "tap"):
        model["router"] = {"name": "topk", "balance": 0.0}
        model["losses" if kind == "loss" else "taps"] = [short]
    elif kind == "experts" and load(name, kind)(site_of(MoEConfig.from_json(MODEL), 0, {})).num != MODEL["num_experts"]:
        model["special"] = [short]  # a bank of its own size stands behind the routed experts
    else:
        model.setdefault(kind, short)
    return found | {"model": model}
