"""Fills the figures of docs/speed.md from the committed results and draws the roofline: `python benchmarks/speed_page.py`.

A block of the page between `<!-- figures: NAME -->` and `<!-- end -->` is replaced; the text around it is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import picture
import shapes
from cells import HERE, show

PAGE = HERE.parent / "docs" / "speed.md"
RESULTS = HERE / "results"
ROOFLINE = "roofline.png"
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.S)
MISSING = "Not measured yet.\n"


def newest(results: Path, question: str) -> tuple[Path, dict[str, Any]] | None:
    """The latest results of a question, by the date in their name."""
    files = [f for f in results.glob(f"{question}_*.json") if shapes.read_json(f)["question"] == question]
    found = max(files, key=lambda f: f.stem.rsplit("_", 1)[-1], default=None)
    return (found, shapes.read_json(found)) if found else None


def rows_of(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def step(report: dict[str, Any]) -> str:
    """Of one token: bytes and their least time, then each native function's time."""
    active, places = report["settings"]["active_bytes"], report["steps"]
    rate = places["in memory"]["memory_rate"]
    parts = [[name, f"{n / 1e6:.1f}", f"{n / rate * 1e3:.2f}"] for name, n in active.items()]
    parts.append(["all", f"{sum(active.values()) / 1e6:.1f}", f"{sum(active.values()) / rate * 1e3:.2f}"])
    out = rows_of(["weights of one token", "MB", f"ms at {rate / 1e9:.1f} GB/s"], parts) + "\n"
    for place, found in places.items():
        total = found["timed_step_ms"]["median"]
        calls = [
            [f"`{n}`", f"{c['calls']:.0f}", f"{c['ms']:.2f}", f"{100 * c['ms'] / total:.1f} %"]
            for n, c in found["native"].items()
        ]
        for half, ms in found["climb_ms"].items():
            if ms:
                at = next(i for i, c in enumerate(calls) if c[0] == "`climb`")
                calls.insert(at + 1, [f"of it, {half}", "", f"{ms:.2f}", f"{100 * ms / total:.1f} %"])
        small = [c for c in calls if float(c[2]) < 0.005 * total]
        rest = [["the others", "", f"{sum(float(c[2]) for c in small):.2f}", ""]] if small else []
        calls = [c for c in calls if c not in small] + rest
        calls.append(["Python", "", f"{found['python_ms']:.2f}", f"{100 * found['python_share']:.1f} %"])
        title = f"a step, {place}: {show(found['step_ms'], '.1f')} ms"
        if found["read_per_token"]:
            title += f", {found['read_per_token'] / 1e6:.0f} MB read in {found['reading_ms']:.1f} ms"
        out += rows_of([title, "calls", "ms", "share"], calls) + "\n"
    return out.rstrip("\n") + "\n"


def roofline(report: dict[str, Any]) -> str:
    rows = [
        [str(r["rows"]), f"{r['operations_per_byte']:.1f}", f"{r['ms']:.2f}", f"{r['bytes_per_s'] / 1e9:.1f}",
         f"{r['bytes_per_s'] / r['memory_rate']:.2f}", f"{r['operations_per_s'] / 1e9:.0f}"]
        for r in report["kernel"]
    ]  # fmt: skip
    head = ["tokens per expert", "operations per byte", "ms", "GB/s of weights", "of the memory's rate", "GOP/s"]
    return f"![Roofline](../benchmarks/results/{ROOFLINE})\n\n" + rows_of(head, rows)


def decode(report: dict[str, Any]) -> str:
    found = report["summary"]
    rows = [
        [
            name,
            show(r["tokens_per_s"], ".1f"),
            show(r["share_of_bound"]),
            show(r["busy_tokens_per_s"], ".1f"),
            show(r["kept_when_busy"]),
        ]
        for name, r in found["programs"].items()
    ]
    head = ["in memory", "tokens/s", "share of the bound", "beside a busy process", "of it kept"]
    said = f"moestro decodes {show(found['times_llama.cpp'])} times as fast, {show(found['times_llama.cpp_when_busy'])} times beside a busy process; "
    return rows_of(head, rows) + f"\n{said}its expert kernel alone reaches {show(found['kernel_share'])} of the memory's rate.\n"


def prefill(report: dict[str, Any]) -> str:
    rows = [
        [r["peer"], str(r["tokens"]), show(r["moestro"], ".1f"), show(r["theirs"], ".1f"), show(r["times"])]
        for r in report["summary"]["rows"]
    ]
    return rows_of(["peer", "prompt", "moestro, tokens/s", "peer, tokens/s", "times"], rows)


def beyond(report: dict[str, Any]) -> str:
    def cell(row: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
        return format(row[key] * scale, form) if row.get(key) is not None else ""

    rows = []
    for r in report["summary"]:
        share = f"{100 * r['budget'] / report['checkpoint_bytes']:.0f} %, {r['locality']}"
        rows.append([share, r["contender"]])
        if "error" in r:
            rows[-1] += ["failed", "", "", "", "", ""]
            continue
        rows[-1] += [cell(r, "decode_rate", ".2f"), cell(r, "read_per_token", ".0f", 1e-6), cell(r, "hit_rate", ".2f")]
        rows[-1] += [cell(r, "bound_ratio", ".2f"), cell(r, "reader_over_probe", ".2f"), cell(r, "moestro_over_this", ".2f")]
    head = [
        "limit, routing",
        "program",
        "tokens/s",
        "MB per token",
        "hit rate",
        "of the bound",
        "own reads over probes",
        "moestro is times faster",
    ]
    return rows_of(head, rows)


def demo(report: dict[str, Any]) -> str:
    rows = []
    for codec, r in report["summary"].items():
        rates = [show(r["bytes_per_s"][name], ".1f", 1e-9) for name in ("moestro", "llama.cpp")]
        rows.append([f"`{codec}`", *rates, show(r["times"]), show(r["first_token_s"])])
    return rows_of(["moestro's weights", "moestro, GB/s", "llama.cpp, GB/s", "times", "first token, s"], rows)


def scaling(report: dict[str, Any], source: Path) -> str:
    rows = [
        [f"{r['percent']} %"]
        + [show(r[name], ".1f") if "median" in r.get(name, {}) else "failed" for name in ("moestro", "llama.cpp", "bound")]
        for r in report["axes"].get("memory", [])
    ]
    shown = f"![Scaling](../benchmarks/results/{source.with_suffix('.png').name})\n"
    return shown + ("\n" + rows_of(["memory", "moestro, tokens/s", "llama.cpp", "bound"], rows) if rows else "")


def filled_from(page: str, results: Path, question: str, figures: Mapping[str, Callable[[dict[str, Any]], str]]) -> str:
    """A page with every block made from the newest results of one question. Raises KeyError for a block that nobody can fill."""
    latest = newest(results, question)

    def block(found: re.Match[str]) -> str:
        make = figures[found[2]]
        return found[1] + (make(latest[1]) if latest else MISSING) + found[3]

    return BLOCK.sub(block, page)


FIGURES: dict[str, tuple[str, Callable[..., str]]] = {
    "step": ("anatomy", step),
    "roofline": ("anatomy", roofline),
    "decode": ("decode", decode),
    "prefill": ("prefill", prefill),
    "beyond": ("larger_than_memory_4bit", beyond),
    "demo": ("demo_speed", demo),
    "scaling": ("scaling", scaling),
}


def filled(page: str, results: Path) -> str:
    """The page with every block made from the newest results. Raises KeyError for a block that nobody can fill."""

    def block(found: re.Match[str]) -> str:
        question, make = FIGURES[found[2]]
        latest = newest(results, question)
        if latest is None:
            return found[1] + MISSING + found[3]
        source, report = latest
        text = make(report, source) if make is scaling else make(report)
        machine = report["machine"]
        said = (
            f"{machine['cpu']}, {machine['cores']} cores, {report['date']}: [{source.name}](../benchmarks/results/{source.name})"
        )
        return f"{found[1]}{text}\n{said}\n{found[3]}"

    return BLOCK.sub(block, page)


def main() -> int:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    if latest := newest(RESULTS, "anatomy"):
        others = {name: found[1] for name in ("decode", "prefill") if (found := newest(RESULTS, name))}
        picture.plot_roofline(latest[1], others, RESULTS / ROOFLINE)
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
