"""Runs one MoE layer's experts on a routed batch, whatever is in memory: waves of experts, each as large as the cache allows.

The result depends on the routing alone: every pair's output row is computed on its own and the rows of a token are added in
slot order, so that hits, misses, waves and slots change no bit. Shapes: T tokens, K slots, D model width, N routed pairs.
"""

from __future__ import annotations

from contextlib import closing

import numpy as np

from moestro.core.experts import ExpertKey
from moestro.core.layer import LayerFacts
from moestro.core.routing import EMPTY
from moestro.engine.cache import ExpertCache
from moestro.engine.prefetch import Glimpse, Prefetcher
from moestro.engine.table import Moment, needed
from moestro.kernels.combine import combine
from moestro.kernels.ffn import ExpertView, grouped_ffn
from moestro.kernels.permute import Sorted, sort_pairs


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
    ) -> np.ndarray:
        """y_TD: float32, the weighted sum of the outputs of MoE layer moment.layer's routed experts.

        Args:
            x_TD: float32, contiguous.
            experts_TK: int64; empty slots (-1) are skipped; see `demanded`.
            weights_TK: float32.
            glimpse: what may be known of the next layer, for the predictor.
        """
        facts = self.layers[moment.layer]
        pairs = sort_pairs(experts_TK, weights_TK, facts.num_experts)
        out_ND = np.empty((pairs.token_N.shape[0], facts.spec.d_model), np.float32)
        keys = needed(moment.layer, experts_TK)
        ahead = self.cache.table.room(moment.layer) > 1  # with one slot the next wave needs it
        with closing(self.cache.waves(keys, moment)) as leases:
            lease = next(leases)
            while True:
                if lease.last and self.prefetcher is not None:
                    placements = self.prefetcher.routed(experts_TK, moment, glimpse)
                    self.cache.fetch(placements, moment, urgent=False)
                following = next(leases) if ahead and not lease.last else None
                for batch in lease.batches():
                    self._compute(facts, x_TD, pairs, batch, out_ND)
                if lease.last:
                    break
                lease = following or next(leases)
        weight_N = np.ones_like(pairs.weight_N) if facts.spec.weigh_input else pairs.weight_N
        y_TD = np.empty((x_TD.shape[0], facts.spec.d_model), np.float32)
        combine(out_ND, pairs.token_N, pairs.slot_N, weight_N, y_TD)
        return y_TD

    def _compute(
        self, facts: LayerFacts, x_TD: np.ndarray, pairs: Sorted, batch: list[tuple[ExpertKey, ExpertView]], out_ND: np.ndarray
    ) -> None:
        """The rows of out_ND that belong to these experts: neighbours in one call, straight into their place."""
        batch = sorted(batch, key=lambda item: item[0].expert)
        ranges = [(int(pairs.starts_E1[k.expert]), int(pairs.starts_E1[k.expert + 1])) for k, _ in batch]
        start, stop = ranges[0][0], ranges[-1][1]
        together = stop - start == sum(b - a for a, b in ranges)
        rows = slice(start, stop) if together else np.concatenate([np.arange(a, b) for a, b in ranges])
        token_N = pairs.token_N[rows]
        target = out_ND[start:stop] if together else np.empty((token_N.shape[0], out_ND.shape[1]), np.float32)
        spec = facts.spec
        grouped_ffn(
            x_TD,
            token_N,
            np.cumsum([0, *(b - a for a, b in ranges)], dtype=np.int64),
            [view for _, view in batch],
            activation=spec.activation,
            limit=spec.limit,
            alpha=spec.alpha,
            out_ND=target,
            threads=self.threads,
            input_weight_N=pairs.weight_N[rows] if spec.weigh_input else None,
        )
        if not together:
            out_ND[rows] = target


def demanded(experts_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """experts_TK (int64) with -1 where nothing has to be computed: empty slots and weight 0."""
    return np.where((experts_TK >= 0) & (weights_TK != 0), experts_TK, EMPTY).astype(np.int64, copy=False)
