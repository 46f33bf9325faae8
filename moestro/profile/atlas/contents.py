"""What is in an atlas: plain data, every number of it a statistic of the profile or a measure's answer."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moestro.core.errors import InputError, ProfileError
from moestro.core.method import card_of, load
from moestro.profile.atlas.links import links
from moestro.profile.atlas.maps import maps
from moestro.profile.atlas.sample import sample
from moestro.profile.atlas.usage import usage
from moestro.profile.coverage import coverage
from moestro.profile.measure import apply
from moestro.profile.profile import Profile

TOP = 12  # token ids of each expert
EXTREME = 10  # times the median output, as the guard of the measure super_experts
OFTEN = 8  # occurrences that an id needs to be listed by its share
# Measures that need no choice of label, the cheap ones; the rest is one `moestro show --measure` away.
MEASURES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("balance", {}),
    ("effective", {}),
    ("routers", {}),
    ("affinity", {}),
    ("domain_specialisation", {"draws": 100}),
    ("vocabulary_specialisation", {}),
    ("context_independence", {}),
    ("redundancy", {}),
    ("super_experts", {}),
    ("srp", {"draws": 200}),
)
# What an atlas shows beside maps: a title, the probe it needs, a statistic of that probe.
PARTS = (
    ("most frequent token ids of an expert", "tokens", "by_token_ILE"),
    ("experts chosen together", "coactivation", "together_LEE"),
    ("similar experts", "similarity", "hsic_LEE"),
    ("where an expert's tokens go next", "transitions", "next_LEE"),
    ("comparison of labels", "usage", "usage_GLE"),
    ("intervals that take whole sequences as the unit", "sequences", "sequence_counts_SLE"),
)
Curves = Mapping[str, Any]  # {"tokens", "experts", "lines": [{"policy", "routing", "slots", "hit_rate"}]}


def contents(
    profile: Profile, *, name: str = "", text: Callable[[int], str] | None = None, curves: Curves | None = None
) -> dict[str, Any]:
    """JSON-ready data of the page.

    Args:
        name: what to call the model.
        text: of one token id; without it ids are shown as numbers.
        curves: of a cache, from replaying the profile's trace.
    """
    drawn, lacking = maps(profile)
    related = links(profile)
    arrays: dict[str, np.ndarray] = {f"map.{m.name}": m.values_MLE for m in drawn}
    arrays |= {f"links.{li.name}.experts": li.experts_LEN for li in related}
    arrays |= {f"links.{li.name}.values": li.values_LEN for li in related}
    for key in ("counts_LE", "usage_GLE"):
        if key in profile.arrays:
            arrays[key] = profile.arrays[key]
    if "next_first_LEE" in profile.arrays:
        first_LEE = profile.arrays["next_first_LEE"]
        arrays |= {"flow_out_LE": first_LEE.sum(2), "flow_in_LE": first_LEE.sum(1)}
    out: dict[str, Any] = {
        "name": name or f"model {profile.model[:12]}",
        "model": profile.model,
        "family": profile.family,
        "tokens": profile.tokens,
        "labels": [{"name": n, "tokens": t, "sequences": 0} for n, t in zip(profile.labels, profile.tokens_G)],
        "layers": [
            {
                "index": la["index"],
                "experts": la["num_experts"],
                "slots": la["top_k"],
                "shared": la["shared"],
                "score": la["score"],
            }
            for la in profile.layers
        ],
        "maps": [
            {"name": m.name, "title": m.title, "unit": m.unit, "about": m.about, "probe": m.probe, "labels": list(m.labels)}
            | {"diverging": m.diverging}
            for m in drawn
        ],
        "links": {li.name: li.about for li in related},
        "curves": dict(curves) if curves is not None else None,
        "made": {
            "data": profile.data,
            "sources": [dict(s) for s in profile.sources],
            "probes": {k.rsplit(".", 1)[-1]: dict(v) for k, v in profile.probes.items()},
        },
    }
    if "usage_GLE" in profile.arrays:
        found = usage(profile)
        arrays |= {"share_low_GLE": found.low_GLE.astype(np.float32), "share_high_GLE": found.high_GLE.astype(np.float32)}
        for label, sequences in zip(out["labels"], found.sequences_G):
            label["sequences"] = sequences
    shown: set[int] = set()
    if "by_token_ILE" in profile.arrays:
        arrays |= (ids := top_ids(profile))
        shown |= set(np.unique(ids["ids.often.ids"]).tolist()) | set(np.unique(ids["ids.own.ids"]).tolist())
        arrays["id_counts_I"], arrays["ids_I"] = _counted(profile, shown)
    if profile.trace is not None and profile.trace.tokens:
        read = sample(profile.trace)
        arrays["sample_tokens_N"] = np.asarray(profile.trace.tokens_T)[read.rows_N]
        arrays["sample_experts_LNK"] = np.asarray(profile.trace.experts_LTK)[:, read.rows_N].astype(np.int64) + 1  # 0: empty slot
        if profile.trace.weights_LTK is not None:
            weights_LNK = np.asarray(profile.trace.weights_LTK)[:, read.rows_N].astype(np.float64)
            arrays["sample_weights_LNK"] = np.rint(1000 * weights_LNK).astype(np.int64)
        positions = np.asarray(profile.trace.positions_T)[read.rows_N]
        out["stretches"] = [
            {"start": at, "label": label, "sequence": sequence, "position": int(positions[at])}
            for at, label, sequence in zip(read.starts_X, read.labels_X, read.sequences_X)
        ]
        out["traced"] = profile.trace.tokens
        shown |= set(np.unique(arrays["sample_tokens_N"]).tolist())
    out["texts"] = {str(i): text(i) for i in sorted(shown - {-1})} if text is not None else {}
    out["measures"], untold = findings(profile)
    out["warnings"] = warnings(profile, out)
    out["missing"] = [
        *({"what": f"map of {k.title}", "probe": k.probe} for k in lacking),
        *({"what": what, "probe": probe} for what, probe, key in PARTS if key not in profile.arrays),
        *untold,
    ]
    out["arrays"] = {key: packed(array) for key, array in arrays.items()}
    return out


def top_ids(profile: Profile) -> dict[str, np.ndarray]:
    """ids_LEN and counts_LEN of each expert: by count, and by the share of the id's occurrences (of ids with `OFTEN` or more)."""
    by_token_ILE = profile.need("tokens", "by_token_ILE")
    ids_I, seen_I = profile.need("tokens", "token_ids_I"), profile.need("tokens", "token_counts_I")
    out: dict[str, np.ndarray] = {}
    share_I = np.where(seen_I >= OFTEN, 1 / np.maximum(1, seen_I), 0)
    most = min(TOP, len(ids_I))
    shape = (*by_token_ILE.shape[1:], most)
    for name in ("often", "own"):
        ids_LEN, counts_LEN = np.full(shape, -1), np.zeros(shape, np.int64)
        for layer in range(shape[0]):
            counts_EI = by_token_ILE[:, layer].T
            worth_EI = counts_EI if name == "often" else counts_EI * share_I
            order_EN = np.argsort(-worth_EI, axis=1, kind="stable")[:, :most]
            there_EN = np.take_along_axis(worth_EI, order_EN, axis=1) > 0
            ids_LEN[layer] = np.where(there_EN, ids_I[order_EN], -1)
            counts_LEN[layer] = np.where(there_EN, np.take_along_axis(counts_EI, order_EN, axis=1), 0)
        out |= {f"ids.{name}.ids": ids_LEN, f"ids.{name}.counts": counts_LEN}
    return out


def _counted(profile: Profile, shown: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Occurrences of the ids shown, and these ids."""
    ids_I = profile.arrays["token_ids_I"]
    kept_I = np.isin(ids_I, list(shown))
    return profile.arrays["token_counts_I"][kept_I], ids_I[kept_I]


def findings(profile: Profile) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What the measures say, and what those that could not be taken lack."""
    told, untold = [], []
    for short, options in MEASURES:
        measure = load(f"profile.measures.{short}", "measure")
        card = card_of(measure)
        try:
            found = apply(measure, profile, options)
        except ProfileError as error:
            untold.append({"what": f"measure {short}", "probe": ", ".join(card.needs), "why": error.found})
        except InputError as error:  # a measure that this model or text does not have: one label, one layer
            untold.append({"what": f"measure {short}", "probe": "", "why": error.found})
        else:
            told.append({"name": short, "title": card.title, "options": dict(options)} | found.to_json())
    return told, untold


def warnings(profile: Profile, out: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing the rest."""
    said = []
    if "counts_LE" in profile.arrays:
        said += [line.strip() for line in coverage(profile).told()]
    by_name = {found["name"]: found for found in out["measures"]}
    for layer, expert, largest, to_median, _ in by_name.get("super_experts", {}).get("rows", ()):
        said.append(
            f"layer {layer}, expert {expert} is a super expert: its largest output, {largest:.4g}, is {to_median:.3g} times the median."
            " Removing or crushing it may ruin the model."
        )
    if "output_most_LE" in profile.arrays and not by_name.get("super_experts", {}).get("rows"):
        most_LE = profile.arrays["output_most_LE"]
        seen = most_LE[most_LE > 0]
        times = float(seen.max() / np.median(seen)) if seen.size else 0.0
        if times >= EXTREME:
            layer = int(most_LE.max(1).argmax())
            said.append(
                f"layer {layer} has outputs of up to {most_LE.max():.4g}, {times:.3g} times the median expert's; the measure super_experts"
                " names none, as several are alike or the layer is among the last, which it leaves out"
            )
    for row in by_name.get("balance", {}).get("rows", ()):
        if row[1] is not None and row[1] > 3:
            said.append(f"layer {row[0]}: the fullest expert has {row[1] + 1:.1f} times the mean load")
    if by_name.get("redundancy") and (twins := [row for row in by_name["redundancy"]["rows"] if row[1]]):
        most = max(row[1] for row in twins)
        said.append(
            f"in {len(twins)} layers some experts are nearly the same as another (CKA above 0.95), at most {100 * most:.0f} % of a layer"
        )
    width = int(profile.experts_L.max())
    if "next_first_LEE" in profile.arrays and profile.tokens < 10 * width**2:
        said.append(
            f"{profile.tokens} tokens are few for {width} experts: information between layers is overstated below about {10 * width**2}"
        )
    few = [label["name"] for label in out["labels"] if label["sequences"] < 5] if "usage_GLE" in profile.arrays else []
    if few and len(profile.labels) > 1:
        said.append("fewer than 5 sequences, so intervals say little: " + ", ".join(few))
    if profile.characters_G is None:
        said.append("the profile is unfinished: not all of its text was read")
    if profile.trace is None or not profile.trace.tokens:
        said.append("no trace is beside the profile: no text and no cache curves (moestro profile without --trace-tokens 0)")
    elif not out["texts"]:
        said.append("no tokenizer was given: tokens are shown as ids (moestro show --model MODEL)")
    return said


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON: base64 of little-endian numbers, integers in the narrowest type that holds them. Nothing is rounded."""
    if array.dtype.kind in "iub":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        kinds = ("u1", "i2", "u2", "i4", "u4")
        kind = next((k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), "f8")
    else:
        kind = "f4" if array.dtype == np.float32 else "f8"
    raw = np.ascontiguousarray(array, np.dtype(f"<{kind}")).tobytes()
    return {"kind": kind, "shape": list(array.shape), "base64": base64.b64encode(raw).decode()}
