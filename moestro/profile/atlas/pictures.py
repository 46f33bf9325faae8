"""The atlas's figures for papers, by matplotlib: PNG, SVG or PDF by the file's ending, from the same numbers as the page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import InputError, ProfileError, StorageError
from moestro.profile.atlas.contents import Curves
from moestro.profile.atlas.maps import maps
from moestro.profile.atlas.usage import usage
from moestro.profile.measures.affinity import affinity
from moestro.profile.measures.redundancy import cka
from moestro.profile.profile import Profile

ENDINGS = (".png", ".svg", ".pdf")
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c6bb1")
MARKERS = "os^Dv<>P"


def draw(
    profile: Profile, figure: str, path: str | Path, options: Mapping[str, Any] | None = None, curves: Curves | None = None
) -> None:
    """Draw one of `FIGURES` into a file.

    Raises InputError for an unknown figure, option or ending, ProfileError for what the profile lacks, StorageError.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path, given = Path(path), dict(options or {})
    if figure not in FIGURES:
        raise InputError(f"there is no figure {figure!r}", expected=", ".join(FIGURES))
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{path} does not say what kind of picture it is", expected="a name that ends in " + ", ".join(ENDINGS))
    make, known = FIGURES[figure]
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"the figure {figure} has no option {', '.join(unknown)}", expected=", ".join(known) or "no options")
    drawn = Figure(layout="constrained")
    if figure == "cache":
        _cache(drawn, curves)
    else:
        make(drawn, profile, **given)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Neither the date nor random element names: the same profile gives the same file.
        stamps = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with rc_context({"svg.hashsalt": "moestro"}):
            kind = path.suffix.lower()
            drawn.savefig(temporary, format=kind[1:], dpi=160, metadata=stamps.get(kind))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(f"cannot write the picture {path}: {error}", fix="choose another --output") from error


def _layer(profile: Profile, layer: Any, most: int | None = None) -> int:
    count = len(profile.layers) if most is None else most
    if not isinstance(layer, int) or not 0 <= layer < count:
        raise InputError(
            f"layer is {layer!r}", expected=f"0 to {count - 1}" if count > 0 else "a model of two MoE layers or more"
        )
    return layer


def _map(figure: Any, profile: Profile, *, statistic: str = "share", label: str = "") -> None:
    """Layers x experts, coloured by a statistic of the map, for all text or a label."""
    made, lacking = maps(profile)
    chosen = next((m for m in made if m.name == statistic), None)
    if chosen is None:
        probe = next((k.probe for k in lacking if k.name == statistic), None)
        if probe is None:
            raise InputError(f"there is no map of {statistic!r}", expected=", ".join(m.name for m in made))
        raise ProfileError(f"the profile has nothing for a map of {statistic}", fix=f"profile again with --probe {probe}")
    if label not in chosen.labels:
        names = ", ".join(name or "'' (all text)" for name in chosen.labels)
        raise InputError(f"the map of {statistic} has no label {label!r}", expected=names)
    values_LE = chosen.values_MLE[chosen.labels.index(label)] * (100 if chosen.unit == "%" else 1)
    layers, experts = values_LE.shape
    figure.set_size_inches(min(14, max(4, 0.16 * experts + 2)), min(12, max(2.4, 0.22 * layers + 1.2)))
    axes = figure.add_subplot()
    edge = float(np.nanmax(np.abs(values_LE))) if np.isfinite(values_LE).any() else 1.0
    scale = {"cmap": "PuOr_r", "vmin": -edge, "vmax": edge} if chosen.diverging else {"cmap": "viridis"}
    axes.set_facecolor("0.88")
    image = axes.imshow(values_LE, aspect="auto", interpolation="nearest", **scale)
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.set_title(chosen.title + (f", {label}" if label else ""), fontsize=10)
    figure.colorbar(image, ax=axes, label={"%": "%", "x": "times the mean"}.get(chosen.unit, ""))


def _labels(figure: Any, profile: Profile, *, layer: int = 0, most: int = 16) -> None:
    """Shares of each label's tokens by expert of one layer, with intervals; the experts that differ most."""
    found, layer = usage(profile), _layer(profile, layer)
    experts = int(profile.experts_L[layer])
    spread_E = np.ptp(found.share_GLE[:, layer, :experts], axis=0)
    order = np.argsort(-spread_E, kind="stable")[:most]
    labels = len(profile.labels)
    figure.set_size_inches(min(14, 2 + 0.16 * labels * len(order) + 0.2 * len(order)), 3.8)
    axes = figure.add_subplot()
    for g, name in enumerate(profile.labels):
        at = np.arange(len(order)) + (g - (labels - 1) / 2) * 0.8 / labels
        share, low, high = (100 * a[g, layer, order] for a in (found.share_GLE, found.low_GLE, found.high_GLE))
        axes.errorbar(
            at,
            share,
            [np.maximum(0, share - low), np.maximum(0, high - share)],
            fmt=MARKERS[g % 8],
            color=HUES[g % 8],
            label=name,
            ms=4,
        )
    axes.set_xticks(range(len(order)), [str(e) for e in order])
    axes.set(xlabel=f"expert of layer {layer}, by difference", ylabel="share of the label's tokens, %", ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def _flow(figure: Any, profile: Profile, *, layer: int = 0) -> None:
    """From each expert of a layer to each of the next, by heaviest expert, as shares of the first."""
    next_LEE = profile.need("transitions", "next_first_LEE")
    layer = _layer(profile, layer, len(next_LEE))
    counts_EE = next_LEE[layer][: profile.experts_L[layer], : profile.experts_L[layer + 1]]
    share_EE = 100 * counts_EE / np.maximum(1, counts_EE.sum(1, keepdims=True))
    _table(figure, share_EE, f"expert of layer {layer + 1}", f"expert of layer {layer}", "% of the first's tokens")


def _similarity(figure: Any, profile: Profile, *, layer: int = 0) -> None:
    """CKA of the outputs of each two experts of a layer."""
    layer = _layer(profile, layer)
    experts = int(profile.experts_L[layer])
    cka_EE = cka(profile.need("similarity", "hsic_LEE")[layer, :experts, :experts])
    _table(figure, cka_EE, f"expert of layer {layer}", f"expert of layer {layer}", "CKA", vmin=0, vmax=1)


def _together(figure: Any, profile: Profile, *, layer: int = 0) -> None:
    """How often each two experts of a layer are chosen for the same token, as shares of the first's tokens."""
    layer = _layer(profile, layer)
    experts = int(profile.experts_L[layer])
    counts_EE = profile.need("coactivation", "together_LEE")[layer, :experts, :experts].astype(np.float64)
    share_EE = 100 * counts_EE / np.maximum(1, np.diag(counts_EE))[:, None]
    np.fill_diagonal(share_EE, np.nan)
    _table(figure, share_EE, f"expert of layer {layer}", f"expert of layer {layer}", "% of the row's tokens")


def _table(figure: Any, values: np.ndarray, across: str, down: str, unit: str, **scale: float) -> None:
    figure.set_size_inches(5.2, 4.2)
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    image = axes.imshow(values, cmap="viridis", interpolation="nearest", **scale)
    axes.set(xlabel=across, ylabel=down)
    figure.colorbar(image, ax=axes, label=unit)


def _affinity(figure: Any, profile: Profile) -> None:
    """Affinity, chance and information from each layer to the next."""
    found = affinity(profile)
    figure.set_size_inches(6, 3.4)
    axes = figure.add_subplot()
    for i, name in enumerate(("affinity", "chance", "information")):
        axes.plot(range(len(found.rows)), found.column(name), color=HUES[i], marker=MARKERS[i], ms=4, label=name)
    axes.set(xlabel="from layer", ylabel="share", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _cache(figure: Any, curves: Curves | None) -> None:
    """Hit rate by cache size."""
    if curves is None:
        raise ProfileError("there are no cache curves: the profile has no trace beside it", fix="profile with a trace")
    figure.set_size_inches(6, 3.8)
    axes = figure.add_subplot()
    for i, line in enumerate(curves["lines"]):
        null = line["routing"] != "trace"
        shares = [100 * s / curves["experts"] for s in line["slots"]]
        axes.plot(
            shares, [100 * h for h in line["hit_rate"]], color=HUES[i % 8], marker=MARKERS[i % 8], ms=4, ls=":" if null else "-",
            label=line["policy"] + (", uniform routing" if null else ""),
        )  # fmt: skip
    axes.set(xlabel="experts in memory, % of all", ylabel="found in memory, %", ylim=(0, 101))
    axes.set_title(f"{curves['tokens']} tokens decoded one by one", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


FIGURES: Mapping[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "map": (_map, ("statistic", "label")),
    "labels": (_labels, ("layer", "most")),
    "flow": (_flow, ("layer",)),
    "together": (_together, ("layer",)),
    "similarity": (_similarity, ("layer",)),
    "affinity": (_affinity, ()),
    "cache": (_cache, ()),
}
