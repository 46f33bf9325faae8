"""How alike a layer's experts are, from a profile: by what they answer, or by which tokens the router likes them on."""

from __future__ import annotations

import numpy as np

from moestro.compress.stats import LayerStats


def by_outputs(stats: LayerStats) -> np.ndarray:
    """Mean cosine of two experts' outputs on the same tokens, EE, -1 to 1. Raises ProfileError without the probe similarity."""
    compared = float(stats.need("similarity", "compared_L"))
    return np.clip(stats.need("similarity", "cosine_LEE") / max(1.0, compared), -1, 1)


def by_logits(stats: LayerStats) -> np.ndarray:
    """Cosine of two experts' columns of router logits, EE, -1 to 1. Raises ProfileError without the probe alikeness."""
    product_EE = stats.need("alikeness", "logit_products_LEE").astype(np.float64)
    length_E = np.sqrt(np.maximum(np.diag(product_EE), 1e-300))
    return np.clip(product_EE / np.outer(length_E, length_E), -1, 1)


def joined(alike_EE: np.ndarray, leaders: np.ndarray) -> np.ndarray:
    """labels_E: the leaders are groups 0, 1, ... in their order; every other expert joins the leader it is most like, ties to the first."""
    labels_E = np.argmax(alike_EE[:, leaders], axis=1)
    labels_E[leaders] = np.arange(len(leaders))
    return labels_E


def clustered(alike_EE: np.ndarray, groups: int, linkage: str) -> np.ndarray:
    """labels_E of agglomerative clustering by the distance 1 - alike, cut where `groups` are left, numbered by their first members."""
    from scipy.cluster.hierarchy import cut_tree
    from scipy.cluster.hierarchy import linkage as link
    from scipy.spatial.distance import squareform

    if len(alike_EE) == 1:
        return np.zeros(1, np.int64)
    distance_EE = np.maximum(0, 1 - (alike_EE + alike_EE.T) / 2)
    np.fill_diagonal(distance_EE, 0)
    raw_E = cut_tree(link(squareform(distance_EE, checks=False), linkage), n_clusters=groups)[:, 0]
    first = list(dict.fromkeys(raw_E.tolist()))
    return np.array([first.index(label) for label in raw_E.tolist()])
