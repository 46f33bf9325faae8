"""Similarity: whether experts of a layer do the same to the same inputs.

Paper      Kornblith et al. 2019, arXiv 1905.00414 (linear CKA); Nguyen et al. 2021, arXiv 2010.15327 (in minibatches, unbiased)
Idea       Redundant experts answer alike to any input, not only to those the router sends them.
Rule       On the same n tokens of each sequence: cosine[l, i, j] = sum of cos(E_i(x), E_j(x)); hsic[l, i, j] = sum over sequences of the
           unbiased HSIC of Y_i Y_i^T and Y_j Y_j^T; CKA = hsic_ij / sqrt(hsic_ii hsic_jj)
Needs      inputs and experts (all of a layer's, whatever the router chose)
Gives      cosine_LEE (sums over compared_L tokens), hsic_LEE
Departs    nothing; with `tokens` below 4 HSIC is not defined and stays 0
Checked    duplicated experts have cosine and CKA 1; CKA ignores a rotation and a scale; independent experts are near 0
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.probes.norms import lengths
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Count, Sum


@method("profile.probes.similarity", kind="probe", fidelity="faithful", paper="2010.15327", needs=("inputs", "experts"))
class Similarity:
    """Every expert on the same tokens. tokens: how many of each sequence, evenly spread."""

    gives = ("cosine_LEE", "hsic_LEE", "compared_L")

    def __init__(self, *, tokens: int = 32) -> None:
        self.tokens = tokens

    def start(self, setting: Setting) -> Statistics:
        shape = (setting.layers, setting.width, setting.width)
        return {"cosine_LEE": Sum(*shape), "hsic_LEE": Sum(*shape), "compared_L": Count(setting.layers)}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        total, count = len(layer.x_TD), layer.facts.num_experts
        rows = np.unique(np.linspace(0, total - 1, min(self.tokens, total)).astype(int))
        x_nD, n = layer.x_TD[rows], len(rows)
        unit_End = np.zeros((count, n, layer.facts.spec.d_model), np.float32)
        gram_Enn = np.zeros((count, n, n))
        for e in range(count):
            y_nD = layer.compute(x_nD, layer.weights(e))[1]
            norm_n1 = lengths(y_nD)[:, None]
            unit_End[e] = y_nD / np.where(norm_n1 > 0, norm_n1, 1)
            scaled = y_nD / max(
                float(np.sqrt((norm_n1**2).mean())), 1e-30
            )  # CKA ignores an expert's scale; sums then stay in range
            gram_Enn[e] = scaled.astype(np.float64) @ scaled.T.astype(np.float64)
        flat = unit_End.reshape(count, -1).astype(np.float64)
        within = (layer.ordinal, slice(count), slice(count))
        statistics["cosine_LEE"].add(within, flat @ flat.T)
        statistics["compared_L"].add(layer.ordinal, n)
        if n >= 4:
            statistics["hsic_LEE"].add(within, unbiased_hsic(gram_Enn))


def unbiased_hsic(gram_Enn: np.ndarray) -> np.ndarray:
    """hsic_EE of every pair of Gram matrices: Song et al. 2012, the estimator whose mean does not depend on n. n is 4 or more."""
    n = gram_Enn.shape[1]
    hollow_Enn = gram_Enn * (1 - np.eye(n))
    sums_En = hollow_Enn.sum(2)
    total_E = sums_En.sum(1)
    flat = hollow_Enn.reshape(len(hollow_Enn), -1)
    first = flat @ flat.T
    second = np.outer(total_E, total_E) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * sums_En @ sums_En.T
    return (first + second - third) / (n * (n - 3))
