"""From a router's logits to expert ids and weights, by the arithmetic that RouterFacts names."""

from __future__ import annotations

import numpy as np

from moestro.core.layer import LayerFacts, RouterFacts
from moestro.kernels.softmax import sigmoid, softmax
from moestro.kernels.topk import topk


def route(logits_TE: np.ndarray, layer: LayerFacts, choice_E: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(ids_TK int64, weights_TK float32), the best first, ties to the lower id. choice_E: a bias on the choice alone.

    logits_TE: float32. The layer's router is one of native.ROUTERS.
    """
    facts = layer.router
    if facts.score == "logits":
        ids_TK, best_TK = topk(logits_TE, layer.top_k)
        weights_TK = softmax(best_TK)
    else:
        scores_TE = softmax(logits_TE) if facts.score == "softmax" else sigmoid(logits_TE)
        wanted_TE = scores_TE if choice_E is None else scores_TE + choice_E
        if facts.groups_kept < facts.groups:
            wanted_TE = _in_best_groups(wanted_TE, facts)
            scores_TE = scores_TE if facts.selection_bias else wanted_TE
        ids_TK, weights_TK = topk(wanted_TE, layer.top_k)
        if wanted_TE is not scores_TE:
            weights_TK = scores_TE[np.arange(len(ids_TK))[:, None], ids_TK]
        if facts.renormalised:
            weights_TK /= np.cumsum(weights_TK, axis=1)[:, -1:] + np.float32(1e-20)  # in slot order, as native code adds
    if facts.scale != 1.0:
        weights_TK *= np.float32(facts.scale)
    return ids_TK, weights_TK


def liked(logits_TE: np.ndarray, layer: LayerFacts, choice_E: np.ndarray | None = None) -> np.ndarray:
    """scores_TE by which the router's choice is ordered, groups left aside."""
    if choice_E is None:
        return logits_TE
    return (softmax(logits_TE) if layer.router.score == "softmax" else sigmoid(logits_TE)) + choice_E


def _in_best_groups(wanted_TE: np.ndarray, facts: RouterFacts) -> np.ndarray:
    """wanted_TE outside each row's best groups replaced by what is never chosen before the rest.

    With a selection bias a group counts the sum of its two best and the rest becomes -inf; without one its best, and 0.
    """
    tokens, experts = wanted_TE.shape
    each_TGE = wanted_TE.reshape(tokens, facts.groups, experts // facts.groups)
    if facts.selection_bias:
        group_TG = np.sort(each_TGE, axis=2)[:, :, -2:].sum(axis=2)
    else:
        group_TG = each_TGE.max(axis=2)
    kept, _ = topk(group_TG, facts.groups_kept)
    mask_TG = np.zeros((tokens, facts.groups), bool)
    np.put_along_axis(mask_TG, kept, True, axis=1)
    rest = np.float32(-np.inf if facts.selection_bias else 0)
    return np.where(mask_TG[:, :, None], each_TGE, rest).reshape(tokens, experts)
