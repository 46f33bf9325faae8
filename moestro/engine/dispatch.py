"""Runs one MoE layer's experts on a routed batch, whatever is in memory: waves of experts, each as large as the cache allows.

The reads of what is missing start before anything else; what is there computes first, then each expert as it lands.
The result depends on the routing alone: every pair's output row is computed on its own and the rows of a token are added in
slot order, so that hits, misses, waves and slots change no bit. Shapes: T tokens, K slots, D model width, N routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.core.layer import LayerFacts
from moestro.core.routing import EMPTY
from moestro.engine.cache import ExpertCache
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.table import Moment, needed
from moestro.kernels.combine import combine
from moestro.kernels.ffn import ExpertView, activate, grouped_ffn
from moestro.kernels.permute import sort_pairs
from moestro.kernels.reader import Hurry
from moestro.layers.taps.compressed_experts import Scales


class Dispatch:
    """The experts of all layers behind one call per layer. threads: of the arithmetic. prefetcher: None reads nothing ahead."""

    def __init__(
        self, cache: ExpertCache, layers: tuple[LayerFacts, ...], threads: int = 1, prefetcher: Prefetcher | None = None
    ) -> None:
        self.cache, self.layers, self.threads, self.prefetcher = cache, layers, threads, prefetcher

    def run(
        self,
        x_TD: np.ndarray,
        experts_TK: np.ndarray,
        weights_TK: np.ndarray,
        moment: Moment,
        glimpse: Glimpse | None = None,
        meanwhile: Callable[[], None] | None = None,
        scales: Scales | None = None,
    ) -> np.ndarray:
        """y_TD: float32, the weighted sum of the outputs of MoE layer moment.layer's routed experts.

        Args:
            x_TD: float32, contiguous.
            experts_TK: int64; empty slots (-1) are skipped; see `demanded`.
            weights_TK: float32.
            glimpse: what may be known of the next layer, for the predictor.
            meanwhile: something else to compute, called when the first reads have been started.
            scales: what multiplies the experts' inputs and neurons, where compressed experts ask for it; computed in numpy.
        """
        facts, cache = self.layers[moment.layer], self.cache
        ahead = cache.table.room(moment.layer) > 1  # with one slot the next wave needs it
        with closing(cache.waves(needed(moment.layer, experts_TK), moment)) as leases:
            lease = next(leases)
            work = _Work(facts, x_TD, experts_TK, weights_TK, self.threads, scales)
            while True:
                if lease.last and self.prefetcher is not None:
                    cache.fetch(self.prefetcher.routed(experts_TK, moment, glimpse), moment, Hurry.SOON)
                following = next(leases) if ahead and not lease.last else None
                if meanwhile is not None:
                    meanwhile()
                    meanwhile = None
                for batch in lease.batches():
                    work.add(batch)
                if lease.last:
                    return work.sum()
                lease = following or next(leases)

    def resident(self, experts_1K: np.ndarray, moment: Moment, glimpse: Glimpse | None = None) -> list[ExpertView] | None:
        """One token's experts in this order, none of them empty, if all are in memory: counted, told to the policy and followed by
        prefetches as by `run`, whose arithmetic is left to the caller, who has to be done before the next call. None: call `run`."""
        views = self.cache.resident(experts_1K[0].tolist(), moment)
        if views is not None and self.prefetcher is not None:
            self.cache.fetch(self.prefetcher.routed(experts_1K, moment, glimpse), moment, Hurry.SOON)
        return views


class _Work:
    """The pairs of one layer and pass, sorted by expert. Their output rows lie in the order in which the experts came."""

    def __init__(
        self,
        facts: LayerFacts,
        x_TD: np.ndarray,
        experts_TK: np.ndarray,
        weights_TK: np.ndarray,
        threads: int,
        scales: Scales | None = None,
    ) -> None:
        self.facts, self.x_TD, self.threads, self.scales = facts, x_TD, threads, scales
        self.pairs = sort_pairs(experts_TK, weights_TK, facts.num_experts)
        self.starts = self.pairs.starts_E1.tolist()
        self.out_ND = np.empty((len(self.pairs.token_N), facts.spec.d_model), np.float32)
        self.done = 0
        self.came: list[slice] = []

    def add(self, batch: list[tuple[ExpertKey, ExpertView]]) -> None:
        """Compute these experts' rows, in one call."""
        starts, spec = self.starts, self.facts.spec
        batch.sort(key=_by_expert)
        begin, ends, came = self.done, [0], []
        for key, _ in batch:
            first, stop = starts[key.expert], starts[key.expert + 1]
            ends.append(ends[-1] + stop - first)
            if came and came[-1].stop == first:
                first = came.pop().start
            came.append(slice(first, stop))
        self.came += came
        self.done += ends[-1]
        if self.scales is not None:
            self._scaled(batch, begin, self.scales)
            return
        grouped_ffn(
            self.x_TD,
            _picked(self.pairs.token_N, came),
            np.array(ends),
            [view for _, view in batch],
            activation=spec.activation,
            limit=spec.limit,
            alpha=spec.alpha,
            out_ND=self.out_ND[begin : self.done],
            threads=self.threads,
            input_weight_N=_picked(self.pairs.weight_N, came) if spec.weigh_input else None,
        )

    def _scaled(self, batch: list[tuple[ExpertKey, ExpertView]], begin: int, scales: Scales) -> None:
        """As grouped_ffn, with each token's scales; one expert in float32 at a time."""
        spec = self.facts.spec
        for key, view in batch:
            token_n = self.pairs.token_N[self.starts[key.expert] : self.starts[key.expert + 1]]
            x_nD, end = self.x_TD[token_n], begin + len(token_n)
            gate_nF = None
            if view.gate is not None:
                gate_nF = (x_nD * scales.gate_TD[token_n]) @ view.gate.dequantise().T + _bias(view.gate_bias)
            up_scale_TD = scales.gate_TD if view.gate is None else scales.up_TD
            up_nF = (x_nD * up_scale_TD[token_n]) @ view.up.dequantise().T + _bias(view.up_bias)
            hidden_nF = activate(gate_nF, up_nF, spec.activation, spec.limit, spec.alpha) * scales.hidden_TF[token_n]
            self.out_ND[begin:end] = hidden_nF @ view.down.dequantise().T + _bias(view.down_bias)
            begin = end

    def sum(self) -> np.ndarray:
        """y_TD, when every expert has come."""
        token_N, slot_N, weight_N = (
            _picked(part, self.came) for part in (self.pairs.token_N, self.pairs.slot_N, self.pairs.weight_N)
        )
        y_TD = np.empty((len(self.x_TD), self.out_ND.shape[1]), np.float32)
        combine(self.out_ND, token_N, slot_N, np.ones_like(weight_N) if self.facts.spec.weigh_input else weight_N, y_TD)
        return y_TD


def _picked(part_N: np.ndarray, came: list[slice]) -> np.ndarray:
    return part_N[came[0]] if len(came) == 1 else np.concatenate([part_N[some] for some in came] or [part_N])


def _bias(bias: np.ndarray | None) -> np.ndarray | float:
    return 0.0 if bias is None else bias


def _by_expert(item: tuple[ExpertKey, ExpertView]) -> int:
    return item[0].expert


def demanded(experts_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """experts_TK (int64) with -1 where nothing has to be computed: empty slots and weight 0."""
    if weights_TK.all() and experts_TK.dtype == np.int64:  # the usual case, at a third of the cost
        return experts_TK
    return np.where((experts_TK >= 0) & (weights_TK != 0), experts_TK, EMPTY).astype(np.int64, copy=False)
