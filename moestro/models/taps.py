"""The taps that a checkpoint's moestro.json puts on its layers' routing: both runners make them from here. Imports no torch.

Other readers of the folder know nothing of them and run every expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from moestro.core.errors import CheckpointError
from moestro.core.method import load
from moestro.core.plans.compression import CompressionPlan, TapUse
from moestro.core.routing import RouteContext, Routing
from moestro.models.checkpoint import Checkpoint

MANIFEST = "moestro.json"
ARRAYS = Path("taps", "weights.safetensors")  # what learned taps read; not where readers look for a model's weights


def read_taps(checkpoint: Checkpoint) -> tuple[tuple[TapUse, ...], ...]:
    """What each MoE layer is given, in order; () where the folder asks for nothing. Raises CheckpointError."""
    made = made_by(checkpoint)
    taps = tuple(la.taps for la in made[0].layers) if made is not None else ()
    return taps if any(taps) else ()


def made_by(checkpoint: Checkpoint) -> tuple[CompressionPlan, int] | None:
    """The compression plan that made the folder, and the experts that a layer had before; None without one. Raises CheckpointError."""
    try:
        record = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / MANIFEST} cannot be read: {error}", fix="apply the plan again") from error
    plan = record.get("plan") if isinstance(record, dict) else None
    if not isinstance(plan, dict) or plan.get("kind") != CompressionPlan.kind:
        return None
    try:
        return CompressionPlan.from_json(plan), int(record["experts"]["before"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / MANIFEST} lacks {error}", fix="apply the plan again") from error


def make_taps(uses: tuple[TapUse, ...], folder: Path) -> tuple[Any, ...]:
    """Of one layer: callables with `point` 'routing' (see core.routing.Tap), or 'experts' (see layers.taps.compressed_experts).

    folder: of the model; learned taps have their arrays there. Raises InputError for a tap that is not known, CheckpointError for
    arrays that are not there.
    """
    return tuple(_make(use, folder) for use in uses)


def _make(use: TapUse, folder: Path) -> Any:
    settings = dict(use.settings)
    prefix = settings.pop("arrays", None)
    if prefix is None:
        return load(use.tap, "tap")(None, **settings)
    try:
        with safe_open(folder / ARRAYS, "np") as file:
            arrays = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / ARRAYS} cannot be read: {error}", fix="train the taps again") from error
    return load(use.tap, "learned tap")(arrays, **settings)


@dataclass(slots=True)
class RoutingTaps:
    """A model's taps on numpy routings, and how many pairs they were shown and left."""

    taps: tuple[tuple[Any, ...], ...]
    shown: int = 0
    left: int = 0
    names: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> RoutingTaps | None:
        """Those that the checkpoint asks for, or None."""
        uses = read_taps(checkpoint)
        if not uses:
            return None
        names = tuple(dict.fromkeys(use.tap for of_layer in uses for use in of_layer))
        return cls(tuple(make_taps(of_layer, checkpoint.path) for of_layer in uses), names=names)

    @property
    def said(self) -> str:
        return f"experts are skipped by {', '.join(self.names)}"

    def reset(self) -> None:
        """Count anew."""
        self.shown = self.left = 0

    def __call__(
        self, ordinal: int, x_TD: np.ndarray, experts_TK: np.ndarray, weights_TK: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """experts_TK and weights_TK after the layer's taps, and the scales that compressed experts leave, or None."""
        routing, scales = Routing(experts_TK, weights_TK), None
        ctx = RouteContext(layer=ordinal, x_TD=x_TD)
        for tap in self.taps[ordinal]:
            if tap.point == "experts":
                routing, scales = tap.split(routing)
            else:
                routing = tap(routing, ctx)
        self.shown += int((experts_TK >= 0).sum())
        self.left += int((routing.experts_TK >= 0).sum())
        return routing.experts_TK, np.asarray(routing.weights_TK, np.float32), scales
