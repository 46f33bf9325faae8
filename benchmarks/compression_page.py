"""Fills the figures of docs/compression.md from the newest results and draws its pictures: `python benchmarks/compression_page.py`.

A block of the page between `<!-- figures: NAME -->` and `<!-- end -->` is replaced; the text around it is written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import recovery_page
from cells import HERE
from compression_grid import OTHER, REMOVING, cells_of
from speed_page import MISSING, filled_from, newest, rows_of

PAGE = HERE.parent / "docs" / "compression.md"
IMAGES = HERE.parent / "docs" / "images"
LEAST = 1e-3  # the smallest growth of the perplexity that is drawn; what is below, or better than the original, lies on this line
FEWEST = 6  # rows of a model that are worth a picture
# What is drawn in one picture: panels of (title, kinds), and the colour of each curve in the order of the rows.
PANELS = (
    ("fewer experts, neurons or numbers", ("criterion", "search", "group", "neurons", "sparsify", "skip")),
    ("fewer bits", ("encode", "bits", "several")),
)
COLOURS = (
    "#0b7a75",
    "#d98e04",
    "#7b4fa3",
    "#b23a48",
    "#2f6db5",
    "#6b8e23",
    "#c2559d",
    "#4a4a4a",
    "#8c6d31",
    "#17a2b8",
    "#e07b39",
    "#5b5bd6",
)
TITLES = {"mixed": "the model trained here", "smollm2": "SmolLM2 with two experts"}

GPTQS = {
    "gptq": "GPTQ beats round-to-nearest",
    "gptq, ordered": "... with the largest inputs first",
    "gptq, apart": "... with each matrix fitted by itself",
}

Row = dict[str, Any]


def rows_for(report: dict[str, Any], model: str, *, broken: bool = False) -> list[Row]:
    return [r for r in report["summary"] if r["model"] == model and ("error" in r) == broken]


def change(ratio: float) -> str:
    """As a share of the original's perplexity, or how many times as large."""
    return f"{100 * (ratio - 1):+.2f} %" if ratio < 2 else f"x {ratio:.1f}" if ratio < 1000 else f"x {ratio:.0e}"


def spread(row: Row) -> str:
    many = len(row["seeds"]) > 1
    return change(row["ratio"]) + (f" ({change(row['low'])} to {change(row['high'])})" if many else "")


def line(row: Row) -> list[str]:
    shown = f"**{row['name']}**" if row["front"] else row["name"]
    size = f"{row['bytes'] / 1e6:.1f}"
    return [shown, row["level"], f"{row['bits']:.2f}", size, spread(row), f"{row['kl']:.4f}", f"{100 * row['agreement']:.1f} %"]


HEAD = ["plan", "level", "bits per weight", "MB as stored", "perplexity", "KL", "routing kept"]


def table(model: str) -> Callable[[dict[str, Any]], str]:
    def made(report: dict[str, Any]) -> str:
        rows = rows_for(report, model)
        text = rows_of(HEAD, [line(r) for r in rows]) if rows else MISSING
        return text + "".join(f"\n- {r['name']}, {r['level']}: {r['error']}" for r in rows_for(report, model, broken=True))

    return made


def front(report: dict[str, Any]) -> str:
    """What no other plan beats at once in size and in perplexity, the largest first."""
    lines = []
    for model, title in TITLES.items():
        rows = sorted((r for r in rows_for(report, model) if r["front"]), key=lambda r: -r["bits"])
        lines += [[title, f"{r['name']}, {r['level']}", f"{r['bits']:.2f}", spread(r)] for r in rows]
    return rows_of(["model", "plan", "bits per weight", "perplexity"], lines) if lines else MISSING


def settings(report: dict[str, Any]) -> str:
    lines = []
    for name, m in report["models"].items():
        shape = (
            f"{m['layers']} layers of {m['experts']} experts, {m['top_k']} used, width {m['d_model']}, experts {m['d_expert']}"
        )
        size = f"{m['expert_bytes'] / 1e6:.0f} + {m['trunk_bytes'] / 1e6:.0f}"
        seeds = m["calibration"].values()
        lines.append([name, shape, size, f"{m['held_out']['tokens']:,}", f"{len(seeds)} x {next(iter(seeds))['tokens']:,}"])
    return rows_of(["model", "shape", "MB (experts + rest)", "held-out tokens", "calibration tokens"], lines)


def find(report: dict[str, Any], model: str, name: str, level: str) -> Row | None:
    return next((r for r in rows_for(report, model) if (r["name"], r["level"]) == (name, level)), None)


def pair(report: dict[str, Any], claim: str, model: str, mine: tuple[str, str], other: tuple[str, str]) -> list[str] | None:
    """One claim that a plan is better than another, seed by seed; what reads no calibration text has one seed."""
    a, b = find(report, model, *mine), find(report, model, *other)
    if a is None or b is None:
        return None
    verdicts = []
    for measure in ("ratio", "kl"):
        ours, theirs = (by_seed(report, model, which, measure) for which in (mine, other))
        each = [ours[s] < theirs.get(s, theirs[min(theirs)]) for s in ours]
        verdicts.append("yes" if all(each) else "no" if not any(each) else f"{sum(each)} of {len(each)} seeds")
    shown = [f"{', '.join(which)}: {spread(row)}, KL {row['kl']:.4f}" for which, row in ((mine, a), (other, b))]
    return [claim, model, *shown, *verdicts]


def by_seed(report: dict[str, Any], model: str, which: tuple[str, str], measure: str) -> dict[int, float]:
    some = [c for c in report["cells"].values() if (c["model"], c["name"], c["level"]) == (model, *which)]
    return {c["seed"]: c[measure] for c in some if "error" not in c}


def claims(report: dict[str, Any]) -> str:
    """What is promised of methods, and what was found."""
    lines: list[list[str] | None] = []
    for model in TITLES:
        for codec in ("uint4:64", "int4:64", "int3:64"):
            for name, claim in GPTQS.items():
                lines.append(pair(report, f"{claim} ({codec})", model, (name, codec), ("rtn", codec)))
            fitted = f"... also when that fits its ranges ({codec})"
            lines.append(pair(report, fitted, model, ("gptq", codec), ("rtn, search", codec)))
            good = f"last matrices that make good what the others lost are better ({codec})"
            lines.append(pair(report, good, model, ("gptq", codec), ("gptq, apart", codec)))
        for bits, uniform in (("2.5 bits", "int2:32"), ("3.25 bits", "int3:64")):
            for budget in ("mc_moe", "mc_sharp"):
                for scope in ("", ", scope model", ", alpha 0.0, beta 0.0", ", alpha 0.0, beta 0.0, scope model"):
                    mine, other = (f"{budget} of rtn{scope}", bits), ("rtn, search", uniform)
                    lines.append(pair(report, f"mixed {bits} beat uniform ones", model, mine, other))
            for scope in ("", ", alpha 0.0, beta 0.0, scope model"):
                fitted = f"mixed {bits} beat uniform ones, of GPTQ"
                lines.append(pair(report, fitted, model, (f"mc_moe of gptq{scope}", bits), ("gptq", uniform)))
        fewer = "mixed 2.5 bits beat 3.25 bits of three quarters of the experts (2.44 bits)"
        lines.append(pair(report, fewer, model, ("mc_moe of gptq", "2.5 bits"), ("reap, then gptq", "-25 %, int3:64")))
    removal = [r for r in rows_for(report, "duplicates") if r["level"] == "-50 %"]
    merged, removed = ([r for r in removal if (r["kind"] == "group") == grouped] for grouped in (True, False))
    if merged and removed:
        mine, other = ((min(some, key=lambda r: r["ratio"])["name"], "-50 %") for some in (merged, removed))
        lines.append(
            pair(report, "merging beats removing where half are duplicates (the best of each)", "duplicates", mine, other)
        )
    found = [row for row in lines if row is not None]
    for model in TITLES:
        some = [r for r in rows_for(report, model) if r["level"] in ("uint4:64", "int4:64") and r["kind"] == "encode"]
        best4 = min((r for r in some if r["name"].startswith("gptq")), key=lambda r: r["ratio"], default=None)
        guarded = find(report, model, "mc_moe of gptq, scope model", "4.75 bits")
        for claim, row in (
            ("4 bits in groups of 64 cost less than 3 %", best4),
            ("... with 8 bits for some experts, 4.75 in the mean", guarded),
        ):
            if row:
                verdict = "yes" if row["high"] < 1.03 else "no"
                found.append([claim, model, f"{row['name']}, {row['level']}: {spread(row)}, KL {row['kl']:.4f}", "", verdict, ""])
    return rows_of(["claim", "model", "this", "against", "by perplexity", "by KL"], found) if found else MISSING


def missing(report: dict[str, Any]) -> str:
    """What the results do not hold: plans without a cell, and how many plans have one seed only although they read a text."""
    lines = []
    for model, kinds in (("mixed", (*REMOVING, *OTHER)), ("smollm2", OTHER), ("embedded", REMOVING), ("duplicates", REMOVING)):
        wanted = cells_of(model, kinds, report["models"].get(model, {"d_expert": 384})["d_expert"])
        there = {(r["name"], r["level"]): r for r in report["summary"] if r["model"] == model}
        gone = list(dict.fromkeys(c.name for c in wanted if (c.name, c.level) not in there))
        once = sum(c.calibrated and len(there.get((c.name, c.level), {}).get("seeds", ())) == 1 for c in wanted)
        said = f"**{model}**: {len(there)} of {len(wanted)} plans"
        said += f", {once} of them with one calibration text only" if once and model != "embedded" else ""
        lines.append(f"- {said}." + (f" Not measured yet: {'; '.join(gone)}." if gone else "") + "\n")
    return "".join(lines)


FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "settings": settings,
    "missing": missing,
    "claims": claims,
    "front": front,
    **{name: table(name) for name in ("mixed", "smollm2", "embedded", "duplicates")},
}


def filled(page: str, results: Path) -> str:
    """The page from the newest results. Raises KeyError for a block that nobody can fill."""
    trained = newest(results, "recovery")
    more = {name: partial(_of_recovery, make, trained and trained[1]) for name, make in recovery_page.FIGURES.items()}
    return filled_from(page, results, "compression", FIGURES | more)


def _of_recovery(make: Callable[[dict[str, Any]], str], trained: dict[str, Any] | None, report: dict[str, Any]) -> str:
    return make(trained) if trained else MISSING


def pictures(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw quality against size of each model into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for model, title in TITLES.items():
        rows = rows_for(report, model)
        if len(rows) < FEWEST:
            continue
        panels = [(said, kinds) for said, kinds in PANELS if any(r["kind"] in kinds for r in rows)]
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(7.4 * len(panels), 6.4), squeeze=False)
        for ax, (said, kinds) in zip(axes[0], panels, strict=True):
            curves(ax, [r for r in rows if r["kind"] in kinds], [r for r in rows if r["front"]])
            ax.set_title(said, fontsize=10)
            ax.set_ylim(LEAST * 0.8, min(3000, 1.4 * max(drawn(r["high"]) for r in rows)))
        axes[0][0].set_ylabel("growth of the perplexity on held-out text")
        figure.suptitle(f"{title}: ringed are the plans that no other beats in both size and quality", fontsize=11)
        figure.tight_layout()
        made.append(folder / f"compression-{model}.png")
        figure.savefig(made[-1], dpi=90)
        plt.close(figure)
    return made


def drawn(ratio: float) -> float:
    return max(ratio - 1, LEAST)


def worst(rows: list[Row], name: str) -> float:
    return max(r["ratio"] for r in rows if r["name"] == name)


def curves(ax: Any, rows: list[Row], front_rows: list[Row]) -> None:
    """A curve for each name, its seeds' range as a bar; of groupings only the best way to fuse."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    for group in dict.fromkeys(n.partition(" + ")[0] for n in names if " + " in n):
        same = [n for n in names if n.startswith(f"{group} + ")]
        best = min(same, key=lambda n: worst(rows, n))
        names = [n for n in names if n not in same or n == best]
    names.sort(key=lambda n: -worst(rows, n))  # the legend in the order of the curves' ends
    for i, name in enumerate(names):
        mine = sorted((r for r in rows if r["name"] == name), key=lambda r: r["bits"])
        colour, style = COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--"
        x, y = [r["bits"] for r in mine], [drawn(r["ratio"]) for r in mine]
        flat = mine[0]["kind"] in ("sparsify", "several")
        ax.plot(x, y, marker="oxs^"[i % 4], ms=5, lw=1.2, color=colour, label=name, ls="" if flat else style)
        for r in mine:
            ax.plot([r["bits"]] * 2, [drawn(r["low"]), drawn(r["high"])], color=colour, lw=0.8, alpha=0.7)
    shown = [r for r in front_rows if r["name"] in names]
    if shown:
        ax.plot([r["bits"] for r in shown], [drawn(r["ratio"]) for r in shown], "o", ms=11, mfc="none", mec="black", mew=1.2)
    ax.set(xscale="log", yscale="log", xlabel="bits per expert weight of the original (not encoded: 16)")
    low, high = min(r["bits"] for r in rows), max(r["bits"] for r in rows)
    ticks = [t for t in (2, 2.5, 3, 4, 6, 8, 10, 12, 14, 16) if low * 0.93 <= t <= high * 1.07]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    steps = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100, 1000]
    ax.set_yticks(steps, ["0.1 % or less", "0.3 %", "1 %", "3 %", "10 %", "30 %", "x 2", "x 4", "x 11", "x 100", "x 1000"])
    ax.grid(color="0.92", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), HERE / "results"), encoding="utf-8")
    if latest := newest(HERE / "results", "compression"):
        for path in pictures(latest[1], IMAGES):
            print(path)
    if latest := newest(HERE / "results", "recovery"):
        print(recovery_page.picture(latest[1], IMAGES))
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
