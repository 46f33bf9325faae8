"""One sequence as a probe sees it: tokens, and what each MoE layer did with them, in numpy whatever the runner uses.

Shapes: T counted tokens of the sequence, E experts, K slots, D model width, F expert width, V vocabulary, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from moestro.core.experts import ExpertKey, ExpertWeights
from moestro.core.layer import LayerFacts, LayerRecord
from moestro.core.routing import Routing
from moestro.kernels.ffn import activate

Fetch = Callable[[ExpertKey], ExpertWeights]


class Work(NamedTuple):
    """What one expert did. tokens_n: rows of the layer's tokens; hidden_nF goes into its last projection, output_nD comes out.

    weights_n: what the output is (or, with `spec.weigh_input`, the input was) multiplied by.
    """

    expert: int
    tokens_n: np.ndarray
    weights_n: np.ndarray
    hidden_nF: np.ndarray
    output_nD: np.ndarray


class SeenLayer:
    """One MoE layer's record, the counted tokens only; derived arrays are made once and shared by the probes.

    ordinal, facts: of the layer. rows_T: places of the counted tokens in their sequence. width: E of the model's widest layer, which
    statistics are padded to. sink_TH: see `LayerRecord`; None for a layer without such attention.
    """

    def __init__(
        self, facts: LayerFacts, record: LayerRecord, rows_T: np.ndarray, width: int, fetch: Fetch | None = None
    ) -> None:
        routing = record.routing
        self.facts, self.ordinal, self.width, self._fetch, self.rows_T = facts, record.ordinal, width, fetch, rows_T
        ids_TK = as_numpy(routing.experts_TK)
        kept = slice(None) if len(rows_T) == len(ids_TK) else rows_T  # all of them need no copy
        self.experts_TK = ids_TK[kept].astype(np.int64, copy=False)
        self.weights_TK = as_numpy(routing.weights_TK)[kept].astype(np.float64)
        self.sink_TH = None if record.sink_TH is None else as_numpy(record.sink_TH)[kept]
        self._logits, self._x, self._y, self._residual = (
            None if a is None else as_numpy(a)[kept] for a in (routing.logits_TE, record.x_TD, record.y_TD, record.residual_TD)
        )

    @property
    def logits_TE(self) -> np.ndarray:
        """The router's logits. Only for probes whose card needs 'logits'."""
        assert self._logits is not None, "the card must say that it needs 'logits'"
        return self._logits

    @property
    def x_TD(self) -> np.ndarray:
        """What goes into router and experts. Only for probes whose card needs 'inputs'."""
        assert self._x is not None, "the card must say that it needs 'inputs'"
        return self._x

    @property
    def y_TD(self) -> np.ndarray:
        """The routed experts' weighted sum. Only for probes whose card needs 'inputs'."""
        assert self._y is not None, "the card must say that it needs 'inputs'"
        return self._y

    @property
    def residual_TD(self) -> np.ndarray:
        """The residual stream before the layer. Only for probes whose card needs 'residual'."""
        assert self._residual is not None, "the card must say that it needs 'residual'"
        return self._residual

    @cached_property
    def chosen_TE(self) -> np.ndarray:
        """float32 [T, width]: 1 where the expert is among the token's, else 0. Its products count exactly up to 2**24."""
        out = np.zeros((len(self.experts_TK), self.width + 1), np.float32)
        np.put_along_axis(out, self.experts_TK, 1, axis=1)  # -1, an empty slot, writes into the last column
        return out[:, :-1]

    @cached_property
    def gates_TE(self) -> np.ndarray:
        """float64 [T, width]: the combine weight of each expert, 0 where it is not chosen."""
        out = np.zeros((len(self.experts_TK), self.width + 1))
        np.put_along_axis(out, self.experts_TK, self.weights_TK, axis=1)
        return out[:, :-1]

    @cached_property
    def order_TK(self) -> np.ndarray:
        """Slots, heaviest weight first; empty ones last."""
        return heaviest_first(self.experts_TK, self.weights_TK)

    @cached_property
    def ranked_TK(self) -> np.ndarray:
        """Expert ids, heaviest weight first; empty slots (-1) last."""
        return np.take_along_axis(self.experts_TK, self.order_TK, axis=1)

    def forget(self) -> None:
        """Let go of what takes much memory; ids and what is derived from them stay for the layers after."""
        self.__dict__.pop("_work", None)
        self._x = self._y = self._residual = self.sink_TH = None

    def weights(self, expert: int) -> ExpertWeights:
        """One expert's weights, float32. Only for probes whose card needs 'experts'."""
        assert self._fetch is not None, "the card must say that it needs 'experts'"
        found = self._fetch(ExpertKey(self.ordinal, expert))
        return ExpertWeights(*(None if (a := getattr(found, f)) is None else as_numpy(a) for f in ExpertWeights.__slots__))  # type: ignore[arg-type]

    def compute(self, x_nD: np.ndarray, weights: ExpertWeights) -> tuple[np.ndarray, np.ndarray]:
        """(hidden_nF, output_nD) of one expert on any inputs, unweighted, float32."""
        spec = self.facts.spec
        up_nF = _affine(x_nD, weights.up_FD, weights.up_F)
        gate_nF = None if weights.gate_FD is None else _affine(x_nD, weights.gate_FD, weights.gate_F)
        hidden_nF = activate(gate_nF, up_nF, spec.activation, spec.limit, spec.alpha)
        return hidden_nF, _affine(hidden_nF, weights.down_DF, weights.down_D)

    def work(self) -> Iterator[Work]:
        """What each expert did with the tokens routed to it, expert by expert. Computed once per layer."""
        yield from self._work

    @cached_property
    def _work(self) -> list[Work]:
        pairs = Routing(self.experts_TK, self.weights_TK).pairs(self.facts.num_experts)
        out: list[Work] = []
        for e in np.flatnonzero(np.diff(pairs.starts_E1)).tolist():
            rows = slice(pairs.starts_E1[e], pairs.starts_E1[e + 1])
            tokens_n, weights_n = pairs.token_N[rows], pairs.weight_N[rows]
            x_nD = self.x_TD[tokens_n]
            if self.facts.spec.weigh_input:
                x_nD = x_nD * weights_n[:, None].astype(np.float32)
            out.append(Work(e, tokens_n, weights_n, *self.compute(x_nD, self.weights(e))))
        return out


@dataclass(slots=True)
class Seen:
    """One sequence. index: its number in the data. tokens_T, positions_T, labels_T: of the counted tokens; labels are numbers.

    text: all tokens of the sequence. counted: which of them are. logits_TV: after every one of them. layers: filled one by one.
    once: what a probe has worked out of the tokens alone, which is the same for every layer.
    """

    index: int
    text: np.ndarray
    counted: np.ndarray
    tokens_T: np.ndarray
    positions_T: np.ndarray
    labels_T: np.ndarray
    logits_TV: Any
    layers: list[SeenLayer] = field(default_factory=list)
    once: dict[str, Any] = field(default_factory=dict)

    def labelled(self) -> Mapping[int, Any]:
        """For each label its tokens, as an index; worked out once."""
        if "labelled" not in self.once:
            labels = np.unique(self.labels_T).tolist()
            self.once["labelled"] = {n: slice(None) if len(labels) == 1 else self.labels_T == n for n in labels}
        return self.once["labelled"]


def heaviest_first(experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Places along the last axis, heaviest weight first, empty slots (-1) last."""
    return np.argsort(np.where(experts >= 0, -weights, np.inf), axis=-1, kind="stable")


def as_numpy(array: Any) -> np.ndarray:
    """numpy or torch to numpy; bfloat16 and float16 become float32, which loses nothing."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()


def _affine(x_nC: np.ndarray, weight_RC: np.ndarray, bias_R: np.ndarray | None) -> np.ndarray:
    y_nR = x_nC.astype(np.float32, copy=False) @ weight_RC.astype(np.float32, copy=False).T
    return y_nR if bias_R is None else y_nR + bias_R
