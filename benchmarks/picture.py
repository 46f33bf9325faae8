"""The pictures of results. `python picture.py RESULTS.json` draws one again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLOURS = {"moestro": "#0b7a75", "llama.cpp": "#d98e04", "accelerate": "#8d99ae"}
PANELS = (("decode_rate", 1.0, "decode, tokens/s"), ("read_per_token", 1e-9, "read from disk, GB per token"))


def plot(report: dict[str, Any], path: Path) -> None:
    """Decoding rate and bytes per token by budget, one column of panels per kind of routing; bars are medians, whiskers ranges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in report["summary"] if "error" not in r]
    kinds = list(dict.fromkeys(r["locality"] for r in report["summary"]))
    names = [name for name in COLOURS if any(r["contender"] == name for r in report["summary"])]
    figure, axes = plt.subplots(len(PANELS), len(kinds), figsize=(4.8 * len(kinds) + 0.6, 6.4), squeeze=False, sharey="row")
    for column, kind in enumerate(kinds):
        for line, (key, scale, label) in enumerate(PANELS):
            ax = axes[line][column]
            budgets = sorted({r["budget"] for r in report["summary"] if r["locality"] == kind})
            _bars(ax, [r for r in rows if r["locality"] == kind and r.get(key) is not None], budgets, names, key, scale)
            ticks = [f"{b / 2**30:.1f} GiB\n({100 * b / report['checkpoint_bytes']:.0f} %)" for b in budgets]
            ax.set_xticks(range(len(budgets)), ticks)
            ax.spines[["top", "right"]].set_visible(False)
            ax.margins(y=0.15)
            if line == 0:
                ax.set_title(f"{kind}: {100 * report['overlap'][kind]:.0f} % of experts recur", fontsize=10)
            if column == 0:
                ax.set_ylabel(label)
    axes[0][0].legend(frameon=False, fontsize=8)
    machine = report["machine"]
    how = "a kernel memory limit" if report["kernel_limit"] else "no limit"
    figure.suptitle(
        f"{report['checkpoint_bytes'] / 1e9:.1f} GB checkpoint under {how}\n"
        f"{machine['cpu']}, {report['threads']} threads, disk {report['disk_rate'] / 1e9:.2f} GB/s, "
        f"read-ahead {report['read_ahead_kib']} KiB",
        fontsize=10,
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_scaling(report: dict[str, Any], path: Path) -> None:
    """One panel per axis: tokens/s against memory, and milliseconds of a step against the others, each with its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes: dict[str, list[dict[str, Any]]] = report["axes"]
    columns = min(3, len(axes))
    lines = -(-len(axes) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for spare in panels.flat[len(axes) :]:
        spare.set_visible(False)
    for ax, (axis, rows) in zip(panels.flat, axes.items(), strict=False):
        where = "percent" if axis == "memory" else "value"
        for name in ("moestro", "llama.cpp", "bound", "ms", "bound_ms"):
            seen = [r for r in rows if "median" in r.get(name, {})]
            if not seen:
                continue
            bound = name.startswith("bound")
            colour = "crimson" if bound else COLOURS.get(name, COLOURS["moestro"])
            label = "bound" if bound else "moestro" if name == "ms" else name
            at = [r[where] for r in seen]
            ax.plot(at, [r[name]["median"] for r in seen], "--" if bound else "o-", color=colour, label=label, ms=4, lw=1.4)
            if not bound:
                ax.fill_between(at, *([r[name][k] for r in seen] for k in ("low", "high")), color=colour, alpha=0.2, lw=0)
        if axis == "memory":
            ax.set_xlabel("memory limit, % of the 4-bit file")
            ax.set_ylabel("decode, tokens/s")
        else:
            ax.set_xlabel(axis.replace("_", "-") + (", tokens" if axis == "context" else ""))
            ax.set_ylabel("ms per decode step")
            ax.set_xscale("log", base=2)
            ticks = [r[where] for r in rows]
            ax.set_xticks(ticks, [str(t) if t < 1024 else f"{t // 1024}k" for t in ticks])
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    machine = report["machine"]
    figure.suptitle(f"{machine['cpu']}, {report['settings']['threads']} threads, 4-bit weights", fontsize=10)
    _save(figure, path)


def plot_roofline(report: dict[str, Any], others: dict[str, dict[str, Any]], path: Path) -> None:
    """Operations per second by operations per byte of weights: the memory's slope, the kernel's best as the roof, and what was reached.

    report: of anatomy. others: of decode and prefill, as far as there are; whole models stand where their arithmetic does.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    kernel = report["kernel"]
    rate = sorted(r["memory_rate"] for r in kernel)[len(kernel) // 2]
    roof = max(r["operations_per_s"] for r in kernel)
    figure, ax = plt.subplots(figsize=(7, 4.6))
    at = [r["operations_per_byte"] for r in kernel]
    left, right = at[0] / 2, at[-1] * 2
    ax.plot([left, roof / rate, right], [left * rate / 1e9, roof / 1e9, roof / 1e9], "--", color="crimson", lw=1.4, label="roof")
    ax.plot(at, [r["operations_per_s"] / 1e9 for r in kernel], "o-", color=COLOURS["moestro"], ms=5, label="expert kernel alone")
    for r in kernel:
        y = r["operations_per_s"] / 1e9
        ax.annotate(str(r["rows"]), (r["operations_per_byte"], y), xytext=(4, -11), textcoords="offset points", fontsize=8)
    if found := others.get("decode"):
        active = sum(found["settings"]["active_bytes"].values())
        for name, row in found["summary"]["programs"].items():
            y = at[0] * row["tokens_per_s"]["median"] * active / 1e9
            ax.plot([at[0]], [y], "s", color=COLOURS[name], ms=8, mec="black", label=f"{name}, a decode step")
    if found := others.get("prefill"):
        for row in found["summary"]["rows"]:
            if row["peer"] != "llama.cpp Q4_0":
                continue
            x = at[0] * row["tokens"] * found["top_k_share"]
            for name, key in (("moestro", "moestro"), ("llama.cpp", "theirs")):
                y = row[key]["median"] * found["operations_per_token"] / 1e9
                label = f"{name}, prompts" if row["tokens"] == found["summary"]["rows"][0]["tokens"] else None
                ax.plot([x], [y], "^", color=COLOURS[name], ms=8, mec="black", label=label)
    ax.set(xscale="log", yscale="log")
    for side in (ax.xaxis, ax.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    ax.set(xlabel="operations per byte of weights (numbers: tokens per expert)", ylabel="GOP/s")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.set_title(
        f"{report['machine']['cpu']}, {report['settings']['threads']} threads: memory {rate / 1e9:.1f} GB/s, 4-bit weights",
        fontsize=10,
    )
    _save(figure, path)


def _bars(ax: Any, rows: list[dict[str, Any]], budgets: list[int], names: list[str], key: str, scale: float) -> None:
    width = 0.8 / len(names)
    label: str | None = "bound"
    for i, name in enumerate(names):
        mine = [r for r in rows if r["contender"] == name]
        at = [budgets.index(r["budget"]) + (i - (len(names) - 1) / 2) * width for r in mine]
        ax.bar(at, [r[key] * scale for r in mine], width * 0.92, label=name, color=COLOURS.get(name))
        for x, r in zip(at, mine):
            low, top = (v * scale for v in r[key + "_range"])
            ax.plot([x, x], [low, top], color="black", lw=1)
            note: dict[str, Any] = {
                "xytext": (0, 3),
                "textcoords": "offset points",
                "ha": "center",
                "va": "bottom",
                "fontsize": 8,
            }
            text, at_y = f"{r[key] * scale:.2f}", top
            if key == "decode_rate" and r.get("bound_ratio"):
                bound = r[key] / r["bound_ratio"]
                ax.plot([x - width / 2, x + width / 2], [bound, bound], color="crimson", lw=1.6, label=label)
                label, at_y = None, 0.0  # at the bar's foot: above the bar it would read as the bound's value
                note["color"] = "white"
            ax.annotate(text, (x, at_y), **note)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    results = json.loads(source.read_text(encoding="utf-8"))
    (plot_scaling if results["question"] == "scaling" else plot)(results, source.with_suffix(".png"))
