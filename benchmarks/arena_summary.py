"""What the arena's cells say together: means over seeds, paired differences to the baseline, and who cannot be told from the best."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from arena_contenders import BASELINE
from scipy import stats

LEVEL = 0.95
NEAR = 0.03  # sizes within this share of the baseline's are equal; its gates alone are 2.7 % of what a token meets
MEANS = (
    "loss", "train_loss", "parameters", "multiply_adds", "active", "active_step", "maxvio", "maxvio_step", "dropped", "dropped_held_out",
    "unrouted", "churn", "information", "information_null", "cpu_seconds",
)  # fmt: skip


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """rows: one per contender that has trained cells, best loss first; and what the spread over seeds allows to say."""
    cells: Mapping[str, Any] = report["cells"]
    by_name = _by_name(cells, report["contenders"])
    rows = [_row(name, seeds, report["contenders"][name]) for name, seeds in by_name.items()]
    noise = spread([[c["loss"] for _, c in sorted(by_name[r["name"]].items())] for r in rows if "loss" in r])
    base = next((r for r in rows if r["name"] == BASELINE and "loss" in r), None)
    for row in rows:
        timed = cells.get(f"{row['name']} / time", {})
        row |= {k: timed[k] for k in ("ms", "times_baseline", "dispatch_share") if k in timed}
        if base is not None and "loss" in row:
            row["sizes"] = [row[k] / base[k] for k in ("parameters", "multiply_adds")]
            row["equal_size"] = all(abs(s - 1) <= NEAR for s in row["sizes"])
            row["difference"] = difference(by_name[row["name"]], by_name[BASELINE], noise)
    rows.sort(key=lambda r: r.get("loss", math.inf))
    equal = [r for r in rows if r.get("equal_size")]
    for row in equal:
        row["near_best"] = noise["margin"] is not None and row["loss"] - equal[0]["loss"] <= noise["margin"]
    return {"noise": noise, "rows": rows}


def _by_name(cells: Mapping[str, Any], contenders: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Trained cells by contender and seed. A seed that fewer than nine in ten contenders have is not finished, and left out."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for key, cell in cells.items():
        name, _, part = key.rpartition(" / ")
        if part != "time" and name in contenders:
            found.setdefault(name, {})[int(part)] = cell
    counts = Counter(seed for seeds in found.values() for seed in seeds)
    whole = {seed for seed, many in counts.items() if many >= 0.9 * max(counts.values())}
    return {name: kept for name, seeds in found.items() if (kept := {s: c for s, c in seeds.items() if s in whole})}


def _row(name: str, seeds: Mapping[int, Mapping[str, Any]], contender: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, **{k: contender[k] for k in ("kind", "methods", "note")}, "seeds": sorted(seeds)}
    broken = [cell["error"] for cell in seeds.values() if "error" in cell]
    if broken:
        return row | {"error": broken[0]}
    found = list(seeds.values())
    row |= {key: statistics.fmean(c[key] for c in found) for key in MEANS if all(key in c for c in found)}
    row["loss_range"] = [min(c["loss"] for c in found), max(c["loss"] for c in found)]
    row["losses"] = {d: statistics.fmean(c["losses"][d] for c in found) for d in found[0]["losses"]}
    return row


def difference(mine: Mapping[int, Any], base: Mapping[int, Any], noise: Mapping[str, Any]) -> dict[str, Any]:
    """Mean of loss - baseline's loss over the seeds that both have. Its interval is by Student's t with the spread of all contenders together:
    a few seeds of one contender would say little of its own. None without a spread, and for the baseline itself."""
    pairs = [mine[s]["loss"] - base[s]["loss"] for s in mine if "loss" in base.get(s, {})]
    found: dict[str, Any] = {"mean": statistics.fmean(pairs), "interval": None, "each": pairs}
    if noise["sd"] is not None and mine is not base:
        half = float(stats.t.ppf((1 + LEVEL) / 2, noise["free"])) * noise["sd"] * math.sqrt(2 / len(pairs))
        found["interval"] = [found["mean"] - half, found["mean"] + half]
    return found


def spread(losses: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Noise between contenders and seeds, of those with every seed.

    sd: what is left of the losses when contender and seed are taken out, with so many degrees of freedom (free). margin: Tukey's: any two means further apart than this differ, with
    all pairs compared at once. None with fewer than two seeds or contenders.
    """
    rows = list(losses)
    most = max((len(r) for r in rows), default=0)
    table_CS = np.array([r for r in rows if len(r) == most])
    if most < 2 or len(table_CS) < 2:
        return {"sd": None, "free": 0, "margin": None, "contenders": len(table_CS), "seeds": most}
    left = table_CS - table_CS.mean(1, keepdims=True) - table_CS.mean(0) + table_CS.mean()
    free = (len(table_CS) - 1) * (most - 1)
    sd = math.sqrt(float((left**2).sum()) / free)
    margin = float(stats.studentized_range.ppf(LEVEL, len(table_CS), free)) * sd / math.sqrt(most)
    return {"sd": sd, "free": free, "margin": margin, "contenders": len(table_CS), "seeds": most}


def table(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{'':1} {'contender':24} {'loss':>7} {'to baseline':>24} {'maxvio':>7} {'active':>7} {'churn':>6} {'inform.':>7} {'time':>6}"
    ]
    for r in found["rows"]:
        if "loss" not in r:
            lines.append(f"  {r['name']:24} broke: {r['error']}")
            continue
        low_high = r["difference"]["interval"]
        between = f"{r['difference']['mean']:+.4f}" + (f" [{low_high[0]:+.3f} {low_high[1]:+.3f}]" if low_high else "")
        cell = [f"{r[k]:.2f}" if k in r else "" for k in ("maxvio", "active", "churn", "information")]
        time = f"{r['times_baseline']['median']:.2f}" if "times_baseline" in r else ""
        mark = "*" if r.get("near_best") else " " if r["equal_size"] else "x"
        lines.append(
            f"{mark} {r['name']:24} {r['loss']:7.4f} {between:>24} {cell[0]:>7} {cell[1]:>7} {cell[2]:>6} {cell[3]:>7} {time:>6}"
        )
    return "\n".join([*lines, "* cannot be told from the best of equal size; x is not of the baseline's size"])
