"""No prediction: every expert is read when it is needed.

Paper      none
Idea       The baseline that any predictor has to beat.
Rule       predict(layer) = ()
Needs      nothing
Gives      an empty ranking
Departs    nothing
Checked    no prefetch is ever issued
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.core.routing import Array
from moestro.engine.prefetch import Glimpse
from moestro.engine.table import Moment


@method("engine.predict.none", kind="predictor", fidelity="exact")
class Nothing:
    """Predicts nothing."""

    def __init__(self, layers: int, num_experts: tuple[int, ...]) -> None:
        pass

    def observe(self, layer: int, experts_TK: Array, moment: Moment) -> None:
        pass

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        return []
