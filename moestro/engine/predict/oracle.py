"""Oracle: knows what the next layer will need. For replay only.

Paper      none
Idea       The bound of prefetching: what a perfect predictor would be worth.
Rule       ranking of layer l = the experts it will use in this pass (or, for an earlier layer, in the next)
Needs      future: for each expert the forward passes that use it, ascending
Gives      a ranking
Departs    nothing
Checked    no miss in decode after the first layer of the first pass, if two layers' experts fit
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from moestro.core.experts import ExpertKey
from moestro.core.method import method
from moestro.core.routing import Array
from moestro.engine.prefetch import Glimpse
from moestro.engine.table import Moment


@method("engine.predict.oracle", kind="predictor", fidelity="exact", needs=("future",))
class Oracle:
    """Sees the future. future: key -> steps of its demands, ascending."""

    def __init__(self, layers: int, num_experts: tuple[int, ...], future: Mapping[ExpertKey, Sequence[int]]) -> None:
        self._experts: list[dict[int, list[int]]] = [{} for _ in range(layers)]
        for key in sorted(future):
            for step in future[key]:
                self._experts[key.layer].setdefault(step, []).append(key.expert)
        self._steps = [sorted(steps) for steps in self._experts]
        self._now = Moment(-1, 0, False)

    def observe(self, layer: int, experts_TK: Array, moment: Moment) -> None:
        self._now = moment

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        if layer > self._now.layer:
            return self._experts[layer].get(self._now.step, [])
        position = bisect_right(self._steps[layer], self._now.step)
        return self._experts[layer][self._steps[layer][position]] if position < len(self._steps[layer]) else []
