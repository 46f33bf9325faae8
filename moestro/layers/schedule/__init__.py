"""Schedules: a hyper-parameter as a function of the step. An option typed `Scheduled` is a number or a `Ramp` (in JSON: an object)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moestro.layers.site import require

SHAPES = ("linear", "cosine", "exponential", "step")


@dataclass(frozen=True, slots=True)
class Ramp:
    """From `start` to `end` over `steps` steps beginning at step `begin`; constant before and after.

    shape: 'linear', 'cosine' (half a period), 'exponential' (constant ratio; both ends positive), 'step' (`start` until the end of
    the ramp, then `end`).
    """

    start: float
    end: float
    steps: int
    begin: int = 0
    shape: str = "linear"

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, f"schedule shape {self.shape!r}", "one of " + ", ".join(SHAPES))
        require(self.steps >= 1, f"a schedule over {self.steps} steps", "at least 1")
        positive = self.start > 0 and self.end > 0
        require(
            self.shape != "exponential" or positive, f"an exponential from {self.start} to {self.end}", "two positive numbers"
        )

    def __call__(self, step: int) -> float:
        """The value at a step."""
        u = min(max((step - self.begin) / self.steps, 0.0), 1.0)
        if u in (0.0, 1.0):
            return self.end if u else self.start
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** u
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * u)) / 2
        return self.start if self.shape == "step" else self.start + (self.end - self.start) * u


Scheduled = float | Ramp | Mapping[str, Any]


def value_at(scheduled: Scheduled, step: int) -> float:
    """The number that an option stands for at a step."""
    return scheduled(step) if isinstance(scheduled, Ramp) else float(scheduled)  # type: ignore[arg-type]


def read(scheduled: Scheduled) -> float | Ramp:
    """An option as given (a number, a Ramp, or its fields as a mapping), checked. Raises InputError."""
    if isinstance(scheduled, Mapping):
        names = {f.name for f in dataclasses.fields(Ramp)}
        require({"start", "end", "steps"} <= set(scheduled) <= names, f"a schedule {dict(scheduled)}", ", ".join(sorted(names)))
        return Ramp(**scheduled)
    require(isinstance(scheduled, int | float | Ramp), f"{scheduled!r}", "a number or a schedule")
    return scheduled
