"""What docs/compression.md shows of the results of recovery.py; `compression_page.py` puts it there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recovery import EVERYTHING, RULED, TASK
from speed_page import MISSING, rows_of

Row = dict[str, Any]
TRAINED = "#0b7a75"
STARTED = "#b9b4a8"
BETTER = "#7b4fa3"


def rows_for(report: dict[str, Any], text: str, *kinds: str) -> list[Row]:
    """Of this text and these kinds, those that could be measured, each after what it was made of."""
    rows = [r for r in report["summary"] if r["model"] == text and r["kind"] in kinds and "error" not in r]
    order = list(dict.fromkeys((start(r), r["level"]) for r in rows))
    return sorted(rows, key=lambda r: order.index((start(r), r["level"])))


def start(row: Row) -> str:
    return row["name"].partition(" + ")[0].partition(", ")[0]


def change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %" if ratio < 2 else f"x {ratio:.2f}"


def spread(row: Row) -> str:
    return change(row["ratio"]) + (f" ({change(row['low'])} to {change(row['high'])})" if len(row["seeds"]) > 1 else "")


def settings(report: dict[str, Any]) -> str:
    said, rows = report["settings"], report["summary"]
    tokens = said["steps"] * said["batch"] * said["length"]
    seeds = sorted({seed for r in rows for seed in r.get("seeds", ())})
    once = [f"{r['name']} {r['level']}" for r in rows if len(r.get("seeds", seeds)) < len(seeds) and r["name"] != "top-1"]
    few = f" With fewer: {'; '.join(once)}." if once else ""
    rates = dict.fromkeys(f"{r['rate']:g}" for r in sorted(rows, key=lambda r: r.get("rate", 0)) if "rate" in r)
    many = f"{len(seeds)} seeds, each with another calibration text and order of the training text." + few
    return (
        f"Every training takes {said['steps']} steps of {said['batch']} sequences of {said['length']} bytes, {tokens:,} in all, on text that "
        f"is not held out, with the method's own learning rate where none is named ({', '.join(rates)}). "
        + (many if len(seeds) > 1 else "One calibration text and order of the training text so far.") + "\n"
    )  # fmt: skip


def recovered(report: dict[str, Any]) -> str:
    """What came back to the pruned, the merged and those with zeros."""
    lines = []
    for row in rows_for(report, "mixed", "pruned", "merged", "zeros"):
        back = f"{100 * row['given_back']:.0f} %" if "given_back" in row else ""
        kept = f"{100 * row['agreement']:.1f} %"
        lines.append([row["name"], row["level"], f"{row['bytes'] / 1e6:.1f}", spread(row), back, f"{row['kl']:.4f}", kept])
    for row in rows_for(report, "mixed", "plain"):
        lines.append(
            [f"the original, {EVERYTHING}", "", f"{row['bytes'] / 1e6:.1f}", spread(row), "", f"{row['kl']:.4f}",
             f"{100 * row['agreement']:.1f} %"]
        )  # fmt: skip
    head = ["what", "level", "MB", "perplexity", "given back", "KL", "routing kept"]
    return rows_of(head, lines) if lines else MISSING


def tasks(report: dict[str, Any]) -> str:
    lines = []
    for text, said in (("mixed", "all domains"), (TASK, "code alone")):
        for row in rows_for(report, text, "task", "plain", *(["pruned"] if text == TASK else [])):
            lines.append(
                [f"{row['name']} {row['level']}".strip(), said, f"{row['bytes'] / 1e6:.1f}", spread(row), against(row), f"{row['kl']:.4f}"]
            )  # fmt: skip
    head = ["what", "trained and judged on", "MB", "perplexity", "beside plain training", "KL"]
    return rows_of(head, lines) if lines else MISSING


def against(row: Row) -> str:
    return change(row["against_plain"]) if "against_plain" in row and row["kind"] != "plain" else ""


def skips(report: dict[str, Any]) -> str:
    lines = []
    for row in rows_for(report, "mixed", "skip", "plain"):
        skipped = f"{100 * row['skipped']:.1f} %"
        lines.append([row["name"], row["level"], skipped, spread(row), against(row), f"{row['kl']:.4f}"])
    head = ["what", "level", "slots skipped", "perplexity", "beside plain training", "KL"]
    return rows_of(head, lines) if lines else MISSING


def retrieved(report: dict[str, Any]) -> str:
    rows = [r for r in report["summary"] if r["kind"] == "retrieval" and "error" not in r]
    lines = []
    for row in rows:
        way = row["name"].partition(", ")[2] or "logits above 0"
        cells = [c for c in report["cells"].values() if (c["name"], c["level"]) == (row["name"], row["level"])]
        for name in cells[0]["domains"]:
            some = [c["domains"][name] for c in cells]
            own, worst, found = (math.exp(sum(math.log(d[key]) for d in some) / len(some)) for key in ("own", "worst", "found"))
            right = [sum(d["accuracy"][n] for d in some) / len(some) for n in row["accuracy"]]
            lines.append(
                [way, row["level"], name, *(change(v) for v in (own, found, worst)), *(f"{100 * a:.0f} %" for a in right)]
            )
        right = [f"{100 * a:.0f} %" for a in row["accuracy"].values()]
        lines.append([way, row["level"], "**all**", *(change(row[key]) for key in ("own", "ratio", "worst")), *right])
    if not lines:
        return MISSING
    ways = ["its own experts", f"those that {RULED} bytes find", "the worst other domain's"]
    return rows_of(["pattern", "experts", "text", *ways, *(f"found by {n} bytes" for n in rows[0]["accuracy"])], lines)


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "recovery": settings,
    "recovery_removed": recovered,
    "recovery_skipped": skips,
    "recovery_tasks": tasks,
    "recovery_retrieved": retrieved,
}


def picture(report: dict[str, Any], folder: Path) -> Path | None:
    """Of every start, what it lost and what was left of it after each training; None where nothing was trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows_for(report, "mixed", "pruned", "merged", "zeros") if ", rate" not in r["name"]]
    plain = next((math.log(r["ratio"]) for r in rows_for(report, "mixed", "plain")), None)
    starts = [r for r in rows if any(s["name"].startswith(f"{r['name']} + ") and s["level"] == r["level"] for s in rows)]
    if not starts:
        return None
    panels = [[s for s in rows if start(s) == r["name"] and s["level"] == r["level"]] for r in starts]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.2, 0.42 * sum(map(len, panels)) + 0.75 * len(panels)), squeeze=False,
        height_ratios=[len(p) + 0.6 for p in panels],
    )  # fmt: skip
    for ax, some in zip(axes[:, 0], panels, strict=True):
        lost = [math.log(r["ratio"]) for r in some]
        colours = [STARTED if i == 0 else TRAINED for i in range(len(some))]
        ax.barh(range(len(some)), lost, color=colours, height=0.72)
        for i, r in enumerate(some):
            ax.plot([math.log(r["low"]), math.log(r["high"])], [i, i], color="black", lw=1)
            ax.annotate(
                change(r["ratio"]),
                (max(lost[i], math.log(r["high"]), 0), i),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        if plain is not None:
            ax.axvline(plain, color=BETTER, lw=1.2, ls="--")
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(some)), ["as it is", *(r["name"].partition(" + ")[2] for r in some[1:])], fontsize=9)
        ax.invert_yaxis()
        ax.set_title(f"{some[0]['name']}, {some[0]['level']}", fontsize=10, loc="left")
        low, high = min(0.0, *lost, plain or 0.0), max(lost)
        ax.set_xlim(low - 0.03 * (high - low), high + 0.12 * (high - low))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8.5)
    axes[-1, 0].set_xlabel(
        "log perplexity over the original's, nats" + ("; dashed: the original after as long a training" if plain else "")
    )
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "recovery.png"
    figure.savefig(made, dpi=90)
    plt.close(figure)
    return made
