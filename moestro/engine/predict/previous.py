"""Previous token: a layer will use again what it used for the token before.

Paper      none
Idea       Routing repeats from token to token; after a prompt its last token stands for the previous one.
Rule       ranking of layer l = experts of layer l in the last forward pass, by number of tokens, ties to the lower id
Needs      nothing
Gives      a ranking
Departs    after a prefill pass only its last row counts, so with several sequences in one prefill pass only the last one's
Checked    right in every place on constant routing; recall equals the repetition rate on planted sticky sequences
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.core.routing import Array
from moestro.engine.prefetch import Glimpse
from moestro.engine.table import Moment, needed


@method("engine.predict.previous", kind="predictor", fidelity="exact")
class Previous:
    """What the layer used last. It guesses nothing of what an LRU cache has just used; it helps where slots are scarce."""

    def __init__(self, layers: int, num_experts: tuple[int, ...]) -> None:
        self._last: list[np.ndarray | None] = [None] * layers

    def observe(self, layer: int, experts_TK: Array, moment: Moment) -> None:
        rows = np.asarray(experts_TK)
        self._last[layer] = rows[-1:] if moment.prefill else rows

    def predict(self, layer: int, glimpse: Glimpse | None = None) -> list[int]:
        rows = self._last[layer]
        return [] if rows is None else [key.expert for key in needed(layer, rows)]
