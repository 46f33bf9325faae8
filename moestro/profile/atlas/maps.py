"""Maps: one number per expert, for all text or for each label, that a layers x experts picture is coloured by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moestro.profile.measures.redundancy import cka
from moestro.profile.profile import Profile

IDS = 10  # token ids that `ids` adds up


@dataclass(frozen=True, slots=True)
class Map:
    """values_MLE: one layers x experts table per entry of `labels`, '' standing for all text; NaN where there is no number.

    unit: '%' for shares (the values are 0-1), 'x' for ratios, '' for others. diverging: 0 is the middle.
    """

    name: str
    title: str
    unit: str
    about: str
    probe: str
    labels: tuple[str, ...]
    values_MLE: np.ndarray
    diverging: bool = False


class Kind(NamedTuple):
    """How a map is made. needs, label_needs: statistics; whole: of all text, L x E; by_label: G x L x E."""

    name: str
    title: str
    unit: str
    about: str
    probe: str
    needs: tuple[str, ...]
    whole: Callable[[Profile], np.ndarray] | None
    label_needs: tuple[str, ...] = ()
    by_label: Callable[[Profile], np.ndarray] | None = None
    diverging: bool = False


def maps(profile: Profile) -> tuple[list[Map], list[Kind]]:
    """Every map that the profile's statistics allow, and the kinds it lacks them for."""
    outside_LE = np.arange(int(profile.experts_L.max()))[None, :] >= profile.experts_L[:, None]
    made, missing = [], []
    for kind in KINDS:
        if not all(name in profile.arrays for name in (*kind.needs, *(kind.label_needs if kind.whole is None else ()))):
            missing.append(kind)
            continue
        tables: list[np.ndarray] = [kind.whole(profile)[None]] if kind.whole else []
        labels = [""] if kind.whole else []
        if kind.by_label and len(profile.labels) > 1 and all(name in profile.arrays for name in kind.label_needs):
            tables.append(kind.by_label(profile))
            labels += profile.labels
        if not tables:
            continue  # a comparison of labels, and there is one
        values_MLE = np.where(outside_LE[None], np.nan, np.concatenate(tables).astype(np.float64))
        made.append(
            Map(kind.name, kind.title, kind.unit, kind.about, kind.probe, tuple(labels), values_MLE, diverging=kind.diverging)
        )
    return made, missing


def ratio(over: np.ndarray, under: np.ndarray | float) -> np.ndarray:
    """over / under, NaN where there is nothing to divide by."""
    under = np.broadcast_to(np.asarray(under, np.float64), np.shape(over))
    return np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under > 0)


def _tokens_G(profile: Profile) -> np.ndarray:
    return np.array(profile.tokens_G, np.float64)[:, None, None]


def _load(profile: Profile, counts_LE: np.ndarray) -> np.ndarray:
    return ratio(counts_LE * profile.experts_L[:, None], counts_LE.sum(-1, keepdims=True))


def _lift(profile: Profile) -> np.ndarray:
    usage_GLE = profile.arrays["usage_GLE"]
    lift_GLE = ratio(ratio(usage_GLE, _tokens_G(profile)), usage_GLE.sum(0) / max(1, profile.tokens))
    return np.log2(lift_GLE, out=np.full(lift_GLE.shape, np.nan), where=lift_GLE > 0)


def _nearest(profile: Profile) -> np.ndarray:
    hsic_LEE = profile.arrays["hsic_LEE"]
    out_LE = np.full(hsic_LEE.shape[:2], np.nan)
    for layer, experts in enumerate(profile.experts_L.tolist()):
        if experts > 1:
            cka_EE = cka(hsic_LEE[layer, :experts, :experts])
            out_LE[layer, :experts] = np.where(np.eye(experts, dtype=bool), -np.inf, cka_EE).max(1)
    return out_LE


def _top_ids(profile: Profile) -> np.ndarray:
    by_token_ILE = profile.arrays["by_token_ILE"]
    most = min(IDS, len(by_token_ILE))
    top_LE = np.partition(by_token_ILE, len(by_token_ILE) - most, axis=0)[-most:].sum(0)
    return ratio(top_LE, profile.arrays["counts_LE"])


def _partner(profile: Profile) -> np.ndarray:
    together_LEE = profile.arrays["together_LEE"]
    apart_LEE = np.where(np.eye(together_LEE.shape[-1], dtype=bool)[None], 0, together_LEE)
    return ratio(apart_LEE.max(2), profile.arrays["counts_LE"])


def _next(profile: Profile) -> np.ndarray:
    counts_LE = profile.arrays["counts_LE"]
    out_LE = np.full(counts_LE.shape, np.nan)
    out_LE[:-1] = ratio(profile.arrays["next_LEE"].max(2), counts_LE[:-1]) if len(counts_LE) > 1 else 0
    return out_LE


def _fires(profile: Profile) -> np.ndarray:
    width_L1 = np.array([[layer["spec"]["d_expert"]] for layer in profile.layers], np.float64)
    return ratio(profile.arrays["fired_LEF"].sum(2), profile.arrays["neuron_tokens_LE"] * width_L1)


KINDS = (
    Kind(
        "share", "share of tokens", "%", "tokens that chose the expert, over all tokens; the even share is K / E", "counts",
        ("counts_LE",), lambda p: p.arrays["counts_LE"] / max(1, p.tokens),
        ("usage_GLE",), lambda p: ratio(p.arrays["usage_GLE"], _tokens_G(p)),
    ),
    Kind(
        "load", "load", "x", "how often it was chosen over the layer's mean; 1 is even", "counts",
        ("counts_LE",), lambda p: _load(p, p.arrays["counts_LE"]), ("usage_GLE",), lambda p: _load(p, p.arrays["usage_GLE"]),
    ),
    Kind(
        "lift", "lift in a label", "", "log2 of its share of the label's tokens over its share of all; 1 is twice as often, -1 half", "usage",
        (), None, ("usage_GLE",), _lift, diverging=True,
    ),
    Kind(
        "weight", "mean weight", "", "mean combine weight on the tokens that chose it", "gates",
        ("mass_LE", "counts_LE"), lambda p: ratio(p.arrays["mass_LE"], p.arrays["counts_LE"]),
        ("usage_GLE", "usage_mass_GLE"), lambda p: ratio(p.arrays["usage_mass_GLE"], p.arrays["usage_GLE"]),
    ),
    Kind(
        "first", "heaviest of a token", "%", "of the tokens that chose it, those whose heaviest expert it was", "gates",
        ("ranks_LKE", "counts_LE"), lambda p: ratio(p.arrays["ranks_LKE"][:, 0], p.arrays["counts_LE"]),
    ),
    Kind(
        "ids", "token concentration", "%", f"of its tokens, those of its {IDS} most frequent token ids", "tokens",
        ("by_token_ILE", "counts_LE"), _top_ids,
    ),
    Kind(
        "partner", "closest partner", "%", "of its tokens, those that it shares with the expert most often chosen beside it", "coactivation",
        ("together_LEE", "counts_LE"), _partner,
    ),
    Kind(
        "next", "surest next expert", "%", "of its tokens, those that choose the same expert in the next MoE layer, the most frequent one",
        "transitions", ("next_LEE", "counts_LE"), _next,
    ),
    Kind(
        "norm", "output norm", "", "mean length of its output before the weight", "norms",
        ("norm_LE", "worked_LE"), lambda p: ratio(p.arrays["norm_LE"], p.arrays["worked_LE"]),
    ),
    Kind(
        "gated_norm", "weighted output norm", "", "mean length of its output times the weight", "norms",
        ("gated_norm_LE", "worked_LE"), lambda p: ratio(p.arrays["gated_norm_LE"], p.arrays["worked_LE"]),
    ),
    Kind(
        "most", "largest output", "", "largest absolute value in its outputs; extreme ones mark super experts", "maxima",
        ("output_most_LE",), lambda p: p.arrays["output_most_LE"],
    ),
    Kind(
        "contribution", "contribution", "", "sum of weight times output norm, tokens weighted by how far their stream turned", "contribution",
        ("contribution_LE",), lambda p: p.arrays["contribution_LE"],
    ),
    Kind(
        "fires", "neurons not zero", "%", "of its neurons on its tokens, those that are not 0", "neurons",
        ("fired_LEF", "neuron_tokens_LE"), _fires,
    ),
    Kind(
        "nearest", "most similar expert", "", "largest CKA with another expert of the layer; 1 is the same up to rotation and scale",
        "similarity", ("hsic_LEE",), _nearest,
    ),
)  # fmt: skip
