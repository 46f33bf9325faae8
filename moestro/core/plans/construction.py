"""ConstructionPlan: a new Mixture-of-Experts checkpoint made out of existing ones, expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from moestro.core.errors import PlanError
from moestro.core.plan import Plan


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """Where an expert comes from: the feed-forward network of decoder layer `layer` of subject number `subject`."""

    subject: int
    layer: int


@dataclass(frozen=True, slots=True)
class RouterStart:
    """How a router's weight_ED begins: drawn from N(0, std^2), the draw fixed by `seed` and the decoder layer's index."""

    std: float
    seed: int


@dataclass(frozen=True, slots=True)
class NewLayer:
    """One MoE layer to make. index: its decoder layer. experts: one source per expert, in order."""

    index: int
    experts: tuple[ExpertSource, ...]
    router: RouterStart


@dataclass(frozen=True, kw_only=True)
class ConstructionPlan(Plan):
    """What a new checkpoint is made of. Everything that is not an expert or a router is copied from subject 0.

    source_format, format: how the subjects and the new checkpoint name their tensors. config: the new config.json.
    dropped: tensors of subject 0 that are not copied because the model computes them itself.
    """

    kind: ClassVar[str] = "construction"
    source_format: str
    format: str
    config: dict[str, Any]
    layers: tuple[NewLayer, ...]
    dropped: tuple[str, ...] = ()

    @classmethod
    def decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        data["dropped"] = tuple(data.get("dropped", ()))
        data["layers"] = tuple(
            NewLayer(
                int(layer["index"]),
                tuple(ExpertSource(int(e["subject"]), int(e["layer"])) for e in layer["experts"]),
                RouterStart(float(layer["router"]["std"]), int(layer["router"]["seed"])),
            )
            for layer in data["layers"]
        )
        return data

    def check_subjects(self, fingerprints: Sequence[str]) -> None:
        """Raises PlanError unless these are the subjects' fingerprints, in order: a construction reads several models."""
        expected = [s.fingerprint for s in self.subjects]
        if list(fingerprints) != expected:
            raise PlanError(
                f"the models at hand are {', '.join(f[:12] for f in fingerprints)}",
                expected="the files the plan was made for: "
                + ", ".join(f"{s.path} ({s.fingerprint[:12]})" for s in self.subjects),
                fix="make the plan again for these models",
            )

    def summary(self) -> str:
        counts = sorted({len(layer.experts) for layer in self.layers})
        sources = {(e.subject, e.layer) for layer in self.layers for e in layer.experts}
        lines = [
            f"{self.format} model of {len(self.layers)} MoE layers with {' to '.join(map(str, counts))} experts each, "
            f"from {', '.join(s.path for s in self.subjects)}",
            f"{sum(len(layer.experts) for layer in self.layers)} experts out of {len(sources)} feed-forward networks; method {self.method}",
        ]
        if self.dropped:
            lines.append(f"not copied, computed by the model itself: {len(self.dropped)} tensors such as {self.dropped[0]}")
        return "\n".join(lines)
