"""The one picture the command draws: hit rate against expert memory, a line per policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moestro.engine.replay import Sweep


def hit_rates(done: Sweep, path: Path, caption: str) -> None:
    """Draw a sweep into a PNG: recorded routing in full lines, the optimum in black, uniform routing dotted. Raises StorageError."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from moestro.core.errors import StorageError
    from moestro.core.method import card_of, load

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    shares = [100 * slots / done.experts for _, slots in done.budgets]
    for row in done.rows():
        name = row["eviction"].rsplit(".", 1)[-1]
        null, bound = row["routing"] != "trace", "future" in card_of(load(row["eviction"], "eviction")).needs
        label = f"{name} (optimum)" if bound else name
        style = {"linestyle": ":" if null else "-", "marker": "o", "markersize": 3, "linewidth": 2 if bound and not null else 1.3}
        if bound or null:
            style["color"] = "black" if not null else ("0.35" if bound else "0.6")
        axes.plot(shares, [100 * rate for rate in row["hit_rate"]], label=f"{label}, uniform routing" if null else label, **style)
    axes.set(xlabel="experts in memory, % of all", ylabel="demands found in memory, %", xlim=(0, 100), ylim=(0, 101))
    axes.set_title(f"Cache hit rate by policy ({caption})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    if any(size for size, _ in done.budgets):
        mib_per_percent = done.budgets[-1][0] / 2**20 / shares[-1]
        above = axes.secondary_xaxis(
            "top", functions=(lambda x: np.multiply(x, mib_per_percent), lambda m: np.divide(m, mib_per_percent))
        )
        above.set_xlabel("expert memory, MiB", fontsize=8)
        above.tick_params(labelsize=8)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(temporary))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write the picture {path}: {error}", fix="choose another --png") from error
