"""TaskPlan: which experts each of several tasks needs, and the pattern by which a query's task is known when it comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moestro.core.errors import PlanError
from moestro.core.layer import ModelFacts
from moestro.core.plan import Plan


@dataclass(frozen=True, slots=True)
class Task:
    """name: for people. pattern: a number for each expert of the first MoE layer. kept: of each MoE layer the ids that stay, ascending."""

    name: str
    pattern: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class TaskPlan(Plan):
    """first, threshold: how a query's pattern is made from the first MoE layer's router logits, as the tasks' own were:
    the mean over tokens of each expert's logit where it is among the `first` highest, else 0; with a threshold, of the softmax over those
    of them that reach it. positive: negative logits count 0."""

    kind: ClassVar[str] = "tasks"
    tasks: tuple[Task, ...]
    first: int = 1
    threshold: float | None = None
    positive: bool = True

    @classmethod
    def decode(cls, data: dict[str, Any]) -> dict[str, Any]:
        data["tasks"] = tuple(
            Task(str(t["name"]), tuple(map(float, t["pattern"])), tuple(tuple(map(int, ids)) for ids in t["kept"]))
            for t in data["tasks"]
        )
        return data

    def check(self, facts: ModelFacts) -> None:
        """As Plan.check, and every task must leave each layer as many experts as a token uses. Raises PlanError."""
        super().check(facts)
        if not self.tasks or len({t.name for t in self.tasks}) < len(self.tasks):
            raise PlanError("the plan has no tasks, or two of one name", fix="make it again")
        for task in self.tasks:
            if len(task.kept) != len(facts.layers) or len(task.pattern) != facts.layers[0].num_experts:
                raise PlanError(f"the task {task.name!r} does not speak of every layer and expert", fix="make the plan again")
            for la, ids in zip(facts.layers, task.kept, strict=True):
                if len(set(ids)) != len(ids) or not set(ids) <= set(range(la.num_experts)) or len(ids) < la.top_k:
                    raise PlanError(
                        f"the task {task.name!r} keeps {len(ids)} experts of MoE layer {la.ordinal}",
                        expected=f"{la.top_k} to {la.num_experts}, each once",
                    )

    def nearest(self, logits_TE: np.ndarray) -> Task:
        """The task whose pattern is nearest to that of a query's tokens, by Euclidean distance."""
        query_E = pattern(logits_TE, self.first, self.threshold, self.positive)
        return min(self.tasks, key=lambda t: float(np.linalg.norm(query_E - np.asarray(t.pattern))))

    def summary(self) -> str:
        counts = [f"{t.name}: {min(map(len, t.kept))} experts of each layer" for t in self.tasks]
        return "\n".join([f"{len(self.tasks)} tasks, told apart by the first MoE layer's router", *counts])


def pattern(logits_TE: np.ndarray, first: int, threshold: float | None, positive: bool) -> np.ndarray:
    """pattern_E of some tokens."""
    logits_TE = logits_TE.astype(np.float64)
    order_TA = np.argsort(-logits_TE, axis=1, kind="stable")[:, :first]
    value_TA = np.take_along_axis(logits_TE, order_TA, 1)
    if threshold is not None:
        over_TA = np.where(value_TA >= threshold, value_TA, -np.inf)
        exp_TA = np.exp(over_TA - np.maximum(over_TA.max(1, keepdims=True), threshold))
        value_TA = exp_TA / np.maximum(exp_TA.sum(1, keepdims=True), 1e-300)
    if positive:
        value_TA = np.maximum(value_TA, 0)
    return np.bincount(order_TA.reshape(-1), value_TA.reshape(-1), logits_TE.shape[1]) / len(logits_TE)
