"""Tokens: which experts each token id is routed to.

Paper      Xue et al. 2024, arXiv 2402.01739 (OpenMoE): routing follows the token id
Idea       If an id almost always goes to the same experts, routing does not look at the context.
Rule       by_token[i, l, e] = occurrences of the i-th most frequent id of the data whose slots hold e
Needs      ids
Gives      by_token_ILE, token_ids_I, token_counts_I
Departs    the ids are the most frequent ones of the data and those asked for, not the whole vocabulary
Checked    sums over ids to the counts when all ids are kept; a planted model sends each id to its experts
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Same


@method("profile.probes.tokens", kind="probe", fidelity="faithful", paper="2402.01739")
class Tokens:
    """Counts per token id. most: how many ids. ids: more of them, as 'ID+ID+...', such as markers that are rare."""

    gives = ("by_token_ILE", "token_ids_I", "token_counts_I")

    def __init__(self, *, most: int = 2048, ids: str = "") -> None:
        self.most, self.ids = most, ids
        self._asked = [int(i) for i in ids.split("+") if i.strip()]
        self._row_V = np.zeros(0, np.int64)

    def start(self, setting: Setting) -> Statistics:
        kept = np.array(list(dict.fromkeys([*self._asked, *setting.frequent[: self.most].tolist()])), np.int64)
        self._row_V = np.full(max(setting.facts.vocabulary, int(kept.max()) + 1), -1, np.int64)
        self._row_V[kept] = np.arange(len(kept))
        counts = Count(len(kept), setting.layers, setting.width, dtype=np.int32)
        return {"by_token_ILE": counts, "token_ids_I": Same(kept), "token_counts_I": Count(len(kept))}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        if layer.ordinal == 0:
            row_T = self._row_V[seen.tokens_T]
            known_T = row_T >= 0
            seen.once["tokens"] = (known_T, *np.unique(row_T[known_T], return_inverse=True))
        known_T, rows, local_T = seen.once["tokens"]
        if layer.ordinal == 0:
            statistics["token_counts_I"].add(rows, np.bincount(local_T, minlength=len(rows)))
        ids_TK = layer.experts_TK[known_T]
        place = (local_T[:, None] * layer.width + ids_TK)[ids_TK >= 0]
        found = np.bincount(place, minlength=len(rows) * layer.width).reshape(len(rows), layer.width)
        statistics["by_token_ILE"].add((rows, layer.ordinal), found)
