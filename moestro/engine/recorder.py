"""Collects a trace while the engine runs: what was routed at the seam, pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moestro.core.layer import ModelFacts
from moestro.core.trace import Trace


class Recorder:
    """Rows of one forward pass after another; padding is no row.

    Args:
        facts: of the model that runs.
        info: said in the trace's header.
    """

    def __init__(self, facts: ModelFacts, info: dict[str, Any] | None = None) -> None:
        self.facts, self.info = facts, dict(info or {})
        self._slots = max(layer.top_k for layer in facts.layers)
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in ("tokens", "sequences", "positions", "steps", "prefill")}
        self._experts: list[list[np.ndarray]] = [[] for _ in facts.layers]
        self._weights: list[list[np.ndarray]] = [[] for _ in facts.layers]
        self._ahead: list[dict[int, np.ndarray]] = []
        self._width = 0

    @property
    def tokens(self) -> int:
        """Rows recorded so far."""
        return sum(len(part) for part in self._rows["tokens"])

    def step(self, number: int, prefill: bool, tokens_T: np.ndarray, sequences_T: np.ndarray, positions_T: np.ndarray) -> None:
        """A forward pass begins; its layers follow."""
        rows = len(tokens_T)
        self._ahead.append({})
        values = (tokens_T, sequences_T, positions_T, np.full(rows, number), np.full(rows, prefill))
        for part, value in zip(self._rows.values(), values, strict=True):
            part.append(np.array(value, np.int32))

    def layer(self, ordinal: int, experts_TK: np.ndarray, weights_TK: np.ndarray) -> None:
        """What a layer demands, with -1 where nothing is computed."""
        gap = ((0, 0), (0, self._slots - experts_TK.shape[1]))
        self._experts[ordinal].append(np.pad(experts_TK.astype(np.int16), gap, constant_values=-1))
        self._weights[ordinal].append(np.pad(np.where(experts_TK < 0, 0, weights_TK).astype(np.float16), gap))

    def layers(self, ordinals: Sequence[int], experts_LK: np.ndarray, weights_LK: np.ndarray) -> None:
        """What several layers demand of one row, none of it empty."""
        experts, weights = experts_LK.astype(np.int16), weights_LK.astype(np.float16)
        if (missing := self._slots - experts.shape[1]) > 0:
            experts, weights = (
                np.pad(experts, ((0, 0), (0, missing)), constant_values=-1),
                np.pad(weights, ((0, 0), (0, missing))),
            )
        for row, ordinal in enumerate(ordinals):
            self._experts[ordinal].append(experts[row : row + 1])
            self._weights[ordinal].append(weights[row : row + 1])

    def ahead(self, ordinal: int, ids_TW: np.ndarray) -> None:
        """What a layer's input made the predictor expect of the next layer."""
        self._ahead[-1][ordinal] = ids_TW.astype(np.int16)
        self._width = max(self._width, ids_TW.shape[1])

    def undo(self) -> None:
        """The pass that began last did not end: forget it."""
        if not self._ahead:
            return
        passes = len(self._ahead) - 1
        del self._ahead[passes:]
        for part in (*self._rows.values(), *self._experts, *self._weights):
            del part[passes:]

    def trace(self) -> Trace:
        """Everything so far."""
        layers, tokens = len(self.facts.layers), self.tokens
        experts = np.full((layers, tokens, self._slots), -1, np.int16)
        weights = np.zeros((layers, tokens, self._slots), np.float16)
        for ordinal in range(layers):
            if self._experts[ordinal]:
                experts[ordinal] = np.concatenate(self._experts[ordinal])
                weights[ordinal] = np.concatenate(self._weights[ordinal])
        rows = {name: np.concatenate(parts) if parts else np.zeros(0, np.int32) for name, parts in self._rows.items()}
        return Trace(
            tokens_T=rows["tokens"],
            sequences_T=rows["sequences"],
            positions_T=rows["positions"],
            steps_T=rows["steps"],
            prefill_T=rows["prefill"].astype(np.uint8),
            experts_LTK=experts,
            weights_LTK=weights,
            num_experts=tuple(layer.num_experts for layer in self.facts.layers),
            model=self.facts.fingerprint,
            ahead_LTK=self._ahead_array(layers, tokens),
            info=self.info,
        )

    def _ahead_array(self, layers: int, tokens: int) -> np.ndarray | None:
        if not self._width:
            return None
        out = np.full((layers, tokens, self._width), -1, np.int16)
        start = 0
        for found, part in zip(self._ahead, self._rows["tokens"], strict=True):
            for ordinal, ids_TW in found.items():
                out[ordinal, start : start + len(part), : ids_TW.shape[1]] = ids_TW
            start += len(part)
        return out
