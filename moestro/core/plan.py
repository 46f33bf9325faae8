"""A plan: what will be done, as readable JSON without tensors. Every feature decides by making one and acts by applying one."""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from moestro.core.errors import PlanError, StorageError
from moestro.core.layer import ModelFacts

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What a plan speaks of: where it was found, and the fingerprint its files had."""

    path: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Base of all plans.

    subjects: the models it speaks of. method: the catalogue name of what made it. options: that method's options.
    inputs: digests of the files it was made from (traces, statistics), by name.
    """

    kind: ClassVar[str]
    subjects: tuple[Subject, ...]
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def summary(self) -> str:
        """A few lines for people."""

    def check(self, facts: ModelFacts) -> None:
        """Raises PlanError when the model is not the one the plan was made for, or its files have changed."""
        known = [s.fingerprint for s in self.subjects]
        if facts.fingerprint not in known:
            raise PlanError(
                f"this plan was made for {', '.join(f'{s.path} ({s.fingerprint[:12]})' for s in self.subjects)}, "
                f"the model at hand is {facts.fingerprint[:12]}",
                expected="the same files: same configuration, tensors and sizes",
                fix="make the plan again for this model",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` is its inverse."""
        return {"moestro_plan": FORMAT, "kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Raises PlanError on unknown or missing fields, and on values of the wrong kind."""
        data = dict(data)
        if data.pop("moestro_plan", None) != FORMAT or data.pop("kind", None) != cls.kind:
            raise PlanError(f"this is not a {cls.kind} plan of format {FORMAT}", fix="make it again with `moestro plan`")
        names = {f.name for f in fields(cls)}
        if unknown := set(data) - names:
            raise PlanError(f"the plan has unknown fields: {', '.join(sorted(unknown))}", expected=", ".join(sorted(names)))
        try:
            data["subjects"] = tuple(Subject(**s) for s in data["subjects"])
            if not data["subjects"]:
                raise ValueError("it names no model")
            return cls(**cls.decode(data))
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"the plan cannot be read: {error}", fix="make it again with `moestro plan`") from error

    @classmethod
    def decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Turn JSON lists and objects into the plan's own field types; subclasses override it."""
        return data

    def save(self, path: str | Path) -> None:
        """Write through a temporary name. Raises StorageError."""
        path = Path(path).absolute()
        temporary = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StorageError(f"cannot write the plan {path}: {error}", fix="choose another --output") from error

    def diff(self, other: Plan) -> list[tuple[str, Any, Any]]:
        """(field path, here, there) for every difference."""
        return _difference("", self.to_json(), other.to_json())


def _difference(at: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        rows = []
        for key in [*a, *(k for k in b if k not in a)]:
            rows += _difference(f"{at}.{key}" if at else str(key), a.get(key), b.get(key))
        return rows
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [row for i, (x, y) in enumerate(zip(a, b, strict=True)) for row in _difference(f"{at}[{i}]", x, y)]
    return [] if a == b else [(at, a, b)]


def read_plan(path: str | Path) -> Plan:
    """The plan in a JSON file, as its own class. Raises PlanError."""
    from moestro.core.plans.compression import CompressionPlan
    from moestro.core.plans.construction import ConstructionPlan
    from moestro.core.plans.residency import ResidencyPlan
    from moestro.core.plans.tasks import TaskPlan

    kinds: dict[str, type[Plan]] = {cls.kind: cls for cls in (ResidencyPlan, ConstructionPlan, CompressionPlan, TaskPlan)}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"there is no plan at {path}", fix="make one with `moestro plan`") from error
    except (OSError, ValueError) as error:
        raise PlanError(f"{path} is not a readable plan: {error}", fix="make it again with `moestro plan`") from error
    if not isinstance(data, dict) or str(data.get("kind")) not in kinds:
        raise PlanError(
            f"{path} is not a plan", expected=f"a plan of kind {', '.join(kinds)}", fix="make one with `moestro plan`"
        )
    return kinds[data["kind"]].from_json(data)
