"""Fills the figures of docs/arena.md from the newest results of the arena and draws its pictures: `python benchmarks/arena_page.py`.

A block of the page between `<!-- figures: NAME -->` and `<!-- end -->` is replaced; the text around it is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from arena_contenders import BASELINE
from arena_summary import NEAR
from cells import HERE
from speed_page import MISSING, filled_from, newest, rows_of

PAGE = HERE.parent / "docs" / "arena.md"
IMAGES = HERE.parent / "docs" / "images"
COLOURS = {"baseline": "#4a4a4a", "loss": "#d98e04", "router": "#0b7a75", "block": "#7b4fa3", "architecture": "#b23a48"}
KINDS = {
    "baseline": "baseline",
    "loss": "loss or tap on top-k",
    "router": "router",
    "block": "block or kind of expert",
    "architecture": "architecture",
}

Row = dict[str, Any]


def trained(report: dict[str, Any]) -> list[Row]:
    """Rows with a loss, best first."""
    return [row for row in report["summary"]["rows"] if "loss" in row]


def names(rows: list[Row]) -> str:
    return "; ".join(row["name"] for row in rows)


def verdict(report: dict[str, Any]) -> str:
    """Who cannot be told from the best, and who from the baseline; no winner inside the spread."""
    rows, noise = trained(report), report["summary"]["noise"]
    equal = [row for row in rows if row["equal_size"]]
    said = [f"{len(rows)} contenders, {len(equal)} of them of the baseline's size (total and active within {100 * NEAR:.0f} %)."]
    if noise["margin"] is None:
        return said[0] + " One seed says nothing of noise: no ranking.\n"
    said.append(
        f"Once contender and seed are taken out, losses scatter with a standard deviation of {noise['sd']:.4f} nats per byte; two means of"
        f" {noise['seeds']} seeds count as different (Tukey, 95 %, all pairs at once) only when they are {noise['margin']:.3f} apart."
    )
    near = [row for row in equal if row["near_best"]]
    said.append(
        f"Of equal size, these {len(near)} cannot be told from the lowest mean ({near[0]['loss']:.3f}): {names(near)}."
        if len(near) > 1
        else f"Of equal size the lowest mean is that of {near[0]['name']} ({near[0]['loss']:.3f}), by more than that margin."
    )
    for word, sign in (("lower", -1), ("higher", 1)):
        clear = [r for r in equal if (i := r["difference"]["interval"]) and i[0] * sign > 0 < i[1] * sign]
        said.append(
            f"Paired by seed, the 95 % interval of the difference to `top-k + balance` lies wholly {'below' if sign < 0 else 'above'} zero"
            f" (a {word} loss) for {len(clear)}: {names(clear) or 'none'}."
        )
    said.append(f"One such interval in twenty misses by chance, that is about {max(1, round(len(equal) / 20))} of {len(equal)}.")
    return "\n".join(f"- {line}" for line in said) + "\n"


def number(row: Row, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def between(row: Row) -> str:
    found = row["difference"]
    low_high = found["interval"]
    return f"{found['mean']:+.3f}" + (f" ({low_high[0]:+.3f} to {low_high[1]:+.3f})" if low_high else "")


def table(report: dict[str, Any]) -> str:
    """All contenders; those that cannot be told from the best of equal size in bold."""
    lines = []
    for row in trained(report):
        shown = f"**{row['name']}**" if row.get("near_best") else row["name"]
        sizes = "" if row["equal_size"] else f"{row['sizes'][0]:.2f}, {row['sizes'][1]:.2f}"
        low, high = row["loss_range"]
        lines.append(
            [shown, f"{row['loss']:.3f} ({low:.3f}-{high:.3f})", between(row), sizes, number(row, "active", ".2f"),
             number(row, "maxvio", ".2f"), number(row, "dropped", ".1%"), number(row, "churn", ".2f"), number(row, "information", ".2f"),
             row["note"]]
        )  # fmt: skip
    head = ["contender", "loss (seeds)", "less the baseline", "size", "experts", "MaxVio", "drops", "churn", "domain", "remark"]
    return rows_of(head, lines)


def steps(report: dict[str, Any]) -> str:
    """Time of a training step and what routing takes of it, fastest first."""
    rows = [row for row in trained(report) if "times_baseline" in row]
    rows.sort(key=lambda row: row["times_baseline"]["median"])
    if not rows:
        return MISSING
    lines = []
    for row in rows:
        t, share = row["times_baseline"], row.get("dispatch_share")
        lines.append(
            [
                row["name"],
                f"{t['median']:.2f} ({t['low']:.2f}-{t['high']:.2f})",
                f"{100 * share['median']:.0f} %" if share else "",
            ]
        )
    return rows_of(["contender", "step, baseline = 1", "routing and dispatch"], lines)


def broken(report: dict[str, Any]) -> str:
    rows = [row for row in report["summary"]["rows"] if "error" in row]
    return (
        "".join(f"- {row['name']}: {row['error']}\n" for row in rows) or "Every contender trained to the end with every seed.\n"
    )


def settings(report: dict[str, Any]) -> str:
    s, text = report["settings"]["shape"], report["settings"]["text"]
    seeds = report["summary"]["noise"]["seeds"]
    tokens = s["steps"] * s["batch"] * s["length"]
    base = next(row for row in report["summary"]["rows"] if row["name"] == BASELINE)
    many = ", ".join(f"{name} {n / 1e6:.1f} M" for name, n in text.items())
    return (
        f"{s['layers']} layers of width {s['d_model']}, {s['heads']} heads, {s['experts']} experts of width {s['d_expert']} in each, top {s['top_k']};"
        f" {base['parameters'] / 1e3:.0f} thousand parameters; bytes as tokens. {s['steps']} steps of {s['batch']} sequences of {s['length']}"
        f" bytes, {tokens / 1e3:.0f} thousand in all; AdamW, {s['rate']:g}, cosine; {seeds} seeds. Text (bytes): {many}; a twentieth is held out,"
        f" of which {s['held_out']} sequences of each domain are read.\n"
    )


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "settings": settings,
    "verdict": verdict,
    "table": table,
    "steps": steps,
    "broken": broken,
}


def filled(page: str, results: Path) -> str:
    """The page from the newest results. Raises KeyError for a block that nobody can fill."""
    return filled_from(page, results, "router_arena", FIGURES)


def pictures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the losses, the domains, the routing and the cost into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, draw in (("losses", losses), ("routing", routing), ("domains", domains), ("cost", cost)):
        figure = draw(report, plt)
        made.append(folder / f"arena-{name}.png")
        figure.savefig(made[-1], dpi=110, bbox_inches="tight")
        plt.close(figure)
    return made


def _axis(ax: Any, rows: list[Row]) -> None:
    """Names of contenders down the side, best on top, in the colour of their kind."""
    ax.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    for label, row in zip(ax.get_yticklabels(), rows):  # without labels beside another panel
        label.set_color(COLOURS[row["kind"]])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.93", lw=0.6)
    ax.set_axisbelow(True)


def _legend(ax: Any, plt: Any, **where: Any) -> None:
    marks = [plt.Line2D([], [], marker="o", ls="", color=COLOURS[kind], label=said) for kind, said in KINDS.items()]
    ax.legend(handles=marks, frameon=False, fontsize=8, **where)


def losses(report: dict[str, Any], plt: Any) -> Any:
    """A dot for each seed, a large one for their mean; hollow where the size is not the baseline's."""
    rows, noise = trained(report), report["summary"]["noise"]
    figure, ax = plt.subplots(figsize=(8, 0.19 * len(rows) + 1.4))
    equal = [row for row in rows if row["equal_size"]]
    if noise["margin"] is not None and equal:
        best = equal[0]["loss"]
        ax.axvspan(best, best + noise["margin"], color="#0b7a75", alpha=0.10, lw=0)
    for place, row in enumerate(rows):
        colour = COLOURS[row["kind"]]
        each = [report["cells"][f"{row['name']} / {seed}"]["loss"] for seed in row["seeds"]]
        ax.plot(each, [place] * len(each), "|", color=colour, ms=6, alpha=0.7)
        ax.plot(row["loss_range"], [place] * 2, color=colour, lw=0.8, alpha=0.6)
        ax.plot([row["loss"]], [place], "o", color=colour, ms=5, mfc=colour if row["equal_size"] else "white")
    _axis(ax, rows)
    ax.set_xlabel("held-out loss, nats per byte, mean over domains; bars are seeds, hollow: another size")
    ax.set_title("shaded: cannot be told from the best of equal size", fontsize=9)
    _legend(ax, plt, loc="upper right")
    return figure


def routing(report: dict[str, Any], plt: Any) -> Any:
    """Balance, active experts, churn and domain information, in the order of the losses."""
    rows = [row for row in trained(report) if "churn" in row]
    panels = (
        ("maxvio", "MaxVio, held out"),
        ("active", "experts per token"),
        ("churn", "churn, 80 % to end"),
        ("information", "domain information"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 0.19 * len(rows) + 1.2), sharey=True)
    for ax, (key, label) in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            if key in row:
                ax.plot([row[key]], [place], "o", color=COLOURS[row["kind"]], ms=4)
        _axis(ax, rows)
        ax.set_xlim(left=min(0.0, *(row.get(key, 0.0) for row in rows)) - 0.02)
        ax.set_xlabel(label, fontsize=9)
        if key in ("maxvio", "active"):
            ax.set_xscale("symlog", linthresh=2)
            ax.xaxis.set_major_formatter("{x:g}")
    figure.suptitle("lowest loss on top", fontsize=9, y=0.9)
    return figure


def domains(report: dict[str, Any], plt: Any) -> Any:
    """Each domain's loss less the baseline's."""
    import numpy as np

    rows = trained(report)
    base = next(row for row in rows if row["difference"]["mean"] == 0 and row["kind"] == "baseline")
    columns = list(base["losses"])
    values = np.array([[row["losses"][d] - base["losses"][d] for d in columns] for row in rows])
    most = float(np.quantile(np.abs(values), 0.95))
    figure, ax = plt.subplots(figsize=(6, 0.19 * len(rows) + 1.2))
    image = ax.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    _axis(ax, rows)
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.xaxis.tick_top()
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            ax.text(
                j,
                i,
                f"{value:+.2f}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if abs(value) > 0.7 * most else "black",
            )
    figure.colorbar(image, ax=ax, shrink=0.4, label="loss less the baseline's, nats per byte")
    return figure


def cost(report: dict[str, Any], plt: Any) -> Any:
    """Loss against the time of a step. Named: who is on the front, the baselines, and who is far out."""
    rows = [row for row in trained(report) if "times_baseline" in row]
    figure, ax = plt.subplots(figsize=(8, 5.2))
    best, named = float("inf"), []
    for row in sorted(rows, key=lambda row: row["times_baseline"]["median"]):
        front, best = row["loss"] < best, min(best, row["loss"])
        time = row["times_baseline"]["median"]
        ax.plot(
            [time],
            [row["loss"]],
            "o",
            color=COLOURS[row["kind"]],
            ms=6,
            mfc=COLOURS[row["kind"]] if row["equal_size"] else "white",
        )
        if front or row["kind"] == "baseline" or time > 1.6:
            named.append((time, row))
    ax.set_xscale("log")
    ticks = [
        t for t in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10) if rows and t <= 1.3 * max(r["times_baseline"]["median"] for r in rows)
    ]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlabel("time of a training step, baseline = 1 (one thread); hollow: another size")
    ax.set_ylabel("held-out loss, nats per byte")
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, plt, loc="upper left")
    _label(figure, ax, named, [(row["times_baseline"]["median"], row["loss"]) for row in rows])
    return figure


def _label(figure: Any, ax: Any, named: list[tuple[float, Row]], points: list[tuple[float, float]]) -> None:
    """Each name beside its point: the first place around it, from near to far, where it covers no point and no other name."""
    figure.canvas.draw()
    taken = [ax.get_legend().get_window_extent()]
    dots = ax.transData.transform(points) if points else []
    places = [(x, y) for far in (0, 9, 18, 27) for x, y in ((6, far), (6, -far), (-6, far), (-6, -far))]
    for time, row in sorted(named, key=lambda pair: pair[1]["loss"]):
        for x, y in places:
            side = "left" if x > 0 else "right"
            line = {"arrowprops": {"arrowstyle": "-", "color": "0.7", "lw": 0.6, "shrinkB": 3}} if abs(y) > 9 else {}
            text = ax.annotate(
                row["name"], (time, row["loss"]), xytext=(x, y), textcoords="offset points", ha=side, va="center", fontsize=7.5,
                color=COLOURS[row["kind"]], **line,
            )  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*dot) for dot in dots):
                break
            if (x, y) != places[-1]:
                text.remove()
        taken.append(box)


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
    if latest := newest(HERE / "results", "router_arena"):
        for path in pictures(latest[1], IMAGES):
            print(path)
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
