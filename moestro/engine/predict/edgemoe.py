"""EdgeMoE: a table of which experts follow the experts of the last two layers.

Paper      Yi, Guo, Wei et al. 2023, arXiv 2308.14352
Idea       Paths through the layers repeat: count which experts came after each pair of layers' experts.
Rule       P(e at l | sorted experts at l - 2, at l - 1), by counting; key unseen: the experts at l - 1 alone; unseen: P(e at l).
           Several tokens add their rows. Layer 1 starts with its one earlier layer, layer 0 with its marginal
Needs      a trace to fit from, or nothing: it goes on counting while it runs
Gives      a ranking
Departs    keys are sorted tuples of the top k experts and rows are shares of all slots (the paper's are top 1). Counting online
           is ours (learn=False is the paper's fixed table), and a layer keeps at most `keys` keys so that memory is bounded
Checked    rows sum to 1; planted paths are learned; hits on a second-order trace: two layers > one layer > marginal
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moestro.core.errors import InputError, StorageError
from moestro.core.method import method
from moestro.core.routing import Array
from moestro.core.trace import Trace
from moestro.engine.prefetch import Glimpse
from moestro.engine.table import Moment

Key = tuple[int, ...]  # the sorted experts of a token at one layer, or of two layers with -1 between
FORMAT = 1


@method("engine.predict.edgemoe", kind="predictor", fidelity="adapted", paper="2308.14352")
class EdgeMoeTable:
    """Two-layer table with back-off.

    path: a table saved before; learn: go on counting; keys: how many keys a layer may hold (0: any number).
    """

    def __init__(
        self, layers: int, num_experts: tuple[int, ...], *, path: str = "", learn: bool = True, keys: int = 512, order: int = 2
    ) -> None:
        assert order in (0, 1, 2), "order is how many earlier layers make a key"
        self._learn, self._keys, self._order = learn, keys, order
        self._num_experts = tuple(num_experts)
        self._rows: list[dict[Key, dict[int, int]]] = [{} for _ in range(layers)]
        self._all = [[0] * n for n in num_experts]
        self._seen: list[list[Key]] = []  # the current pass: each token's experts at the last one or two layers
        if path:
            self._load(Path(path))

    @classmethod
    def fit(cls, trace: Trace, *, learn: bool = False, keys: int = 0, order: int = 2) -> EdgeMoeTable:
        """Count a whole trace."""
        table = cls(trace.layers, trace.num_experts, learn=True, keys=keys, order=order)
        for step in trace.steps():
            for layer in range(trace.layers):
                table.observe(layer, trace.experts_LTK[layer, step.rows], Moment(step.step, layer, step.prefill))
        table._learn, table._seen = learn, []
        return table

    def observe(self, layer: int, experts_TK: Array, moment: Moment) -> None:
        now = [tuple(sorted(e for e in row if e >= 0)) for row in np.asarray(experts_TK).tolist()]
        if layer == 0:
            self._seen = []
        if self._learn:
            self._count(layer, now)
        self._seen = [*self._seen[-1:], now]

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        if layer == 0 or not self._seen:
            p_E = self.row(layer, [])
        else:
            p_E = np.sum([self.row(layer, keys) for keys in self._paths()], axis=0)
        return np.argsort(-p_E, kind="stable")[: np.count_nonzero(p_E)].tolist()

    def row(self, layer: int, keys: Sequence[Key]) -> np.ndarray:
        """p_E of `layer`: of the first known key, else the marginal; sums to 1, or is all 0 while nothing was seen."""
        p_E = np.zeros(self._num_experts[layer])
        rows = self._rows[layer]
        for key in keys:
            if counts := rows.get(key):
                p_E[list(counts)] = list(counts.values())
                return p_E / p_E.sum()
        p_E[:] = self._all[layer]
        return p_E / max(1, p_E.sum())

    def save(self, path: str | Path) -> None:
        """Write the table as JSON through a temporary name. Raises StorageError."""
        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        rows = [[[list(key), sorted(counts.items())] for key, counts in layer.items()] for layer in self._rows]
        said = {"moestro_path_table": FORMAT, "num_experts": list(self._num_experts), "all": self._all, "rows": rows}
        try:
            temporary.write_text(json.dumps(said), encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"cannot write the table {path}: {error}", fix="choose another path") from error

    def _load(self, path: Path) -> None:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said["moestro_path_table"] != FORMAT or tuple(said["num_experts"]) != self._num_experts:
                raise ValueError("it is of another format or another model")
            rows = [{tuple(key): {int(e): int(n) for e, n in counts} for key, counts in layer} for layer in said["rows"]]
            counts = [[int(n) for n in layer] for layer in said["all"]]
            if len(rows) != len(self._rows) or [len(c) for c in counts] != list(self._num_experts):
                raise ValueError("it is of another model")
            self._rows, self._all = rows, counts
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a readable path table of this model: {error}", fix="fit it again from a trace of this model"
            ) from error

    def _paths(self) -> list[list[Key]]:
        """For each token its keys, the longest first."""
        last = self._seen[-1]
        if self._order == 0:
            return [[] for _ in last]
        if self._order == 1 or len(self._seen) == 1:
            return [[key] for key in last]
        return [[(*before, -1, *key), key] for before, key in zip(self._seen[-2], last, strict=True)]

    def _count(self, layer: int, now: list[Key]) -> None:
        rows, marginal = self._rows[layer], self._all[layer]
        paths = self._paths() if layer and self._seen else [[] for _ in now]
        for experts, keys in zip(now, paths, strict=True):
            for e in experts:
                marginal[e] += 1
            for key in keys:
                counts = rows.get(key)
                if counts is None:
                    if self._keys and len(rows) >= self._keys:
                        continue
                    counts = rows[key] = {}
                for e in experts:
                    counts[e] = counts.get(e, 0) + 1
