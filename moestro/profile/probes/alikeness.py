"""Alikeness of routers' logits: which experts are liked by the same tokens.

Paper      Li et al. 2023, arXiv 2310.01334 (M-SMoE), its router-logit similarity
Idea       Experts that the router likes on the same tokens do similar things, and the router is cheap to watch.
Rule       logit_products[l, i, j] = sum over tokens of z_i z_j; the cosine of two experts' columns is products_ij / sqrt(products_ii products_jj)
Needs      the router's logits
Gives      logit_products_LEE
Departs    nothing
Checked    against numpy on the runner's logits; independent of the order of shards
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Sum


@method("profile.probes.alikeness", kind="probe", fidelity="exact", paper="2310.01334", needs=("logits",))
class Alikeness:
    """Products of logits, summed."""

    gives = ("logit_products_LEE",)

    def start(self, setting: Setting) -> Statistics:
        return {"logit_products_LEE": Sum(setting.layers, setting.width, setting.width)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        logits_TE = layer.logits_TE.astype(np.float64)
        experts = logits_TE.shape[1]
        statistics["logit_products_LEE"].add((layer.ordinal, slice(experts), slice(experts)), logits_TE.T @ logits_TE)
