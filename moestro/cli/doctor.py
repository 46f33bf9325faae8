"""`moestro doctor`: what this machine and this installation can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moestro.cli.arguments import Json
from moestro.cli.output import emit, say, size, table

EPILOG = """Examples:

\b
  moestro doctor
  moestro doctor --folder /data/models     measure the disk that holds your models
  moestro doctor --no-probe --json"""
PROBE_BYTES, READ_BYTES = 256 << 20, 4 << 20
LAB = ("torch", "transformers", "scipy", "psutil", "matplotlib", "accelerate", "scikit-learn", "networkx", "threadpoolctl")
LEAN = ("numpy", "safetensors", "tokenizers", "jinja2", "huggingface_hub", "gguf", "typer", "rich")


def doctor(
    folder: Annotated[Path | None, typer.Option(help="Measure the disk of this folder; the Hub's cache if not given.")] = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure the disk and the memory (a second or two).")] = True,
    as_json: Json = False,
) -> int:
    """Report versions, native kernels, memory and disk, and what to do about what is missing."""
    report = examine(folder, probe)
    if as_json:
        emit(report)
    else:
        print(table(("what", "found"), [(name, text) for name, text in _lines(report)]))
        say(*(f"note: {note}" for note in report["notes"]))
    return 0


def examine(folder: Path | None, probe: bool) -> dict[str, Any]:
    """Everything the doctor knows, as plain data. Rates in bytes/s, sizes in bytes."""
    import platform

    import moestro
    from moestro.engine import memory
    from moestro.kernels import bandwidth, native

    used = memory.usage()
    folder = _existing(folder or _hub_cache())
    report: dict[str, Any] = {
        "moestro": moestro.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": native.cores(),
        "packages": {name: _version(name) for name in (*LEAN, *LAB)},
        "kernels": {"level": native.level(), "levels": list(native.levels())},
        "memory_available": memory.available(),
        "memory_limit": used.limit,
        "folder": str(folder),
        "read_ahead_bytes": read_ahead(folder),
        "disk_rate": None,
        "memory_rate": None,
        "notes": [],
    }
    if probe:
        report["disk_rate"] = disk_rate(folder, report["notes"])
        report["memory_rate"] = bandwidth.probe()
    report["notes"] += _advice(report)
    return report


def disk_rate(folder: Path, notes: list[str]) -> float | None:
    """Bytes/s of direct reads of 4 MiB from a temporary file in `folder`; None with a note when it cannot be written."""
    import os
    import tempfile

    from moestro.kernels.reader import probe

    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".moestro-probe-") as f:
            block = os.urandom(READ_BYTES)
            for _ in range(PROBE_BYTES // READ_BYTES):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            return probe(Path(f.name), READ_BYTES)
    except OSError as error:
        notes.append(f"the disk of {folder} was not measured: {error}")
        return None


def read_ahead(folder: Path) -> int | None:
    """The block device's read-ahead under `folder` in bytes, or None where the system does not tell."""
    import os

    try:
        number = os.stat(folder).st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
        queue = next(p / "queue" for p in (device, device.parent) if (p / "queue" / "read_ahead_kb").exists())
        return int((queue / "read_ahead_kb").read_text()) * 1024
    except (OSError, ValueError, StopIteration):
        return None


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.expanduser().resolve()
    return next(p for p in (folder, *folder.parents) if p.is_dir())


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _advice(report: dict[str, Any]) -> list[str]:
    notes = []
    kernels = report["kernels"]
    if kernels["level"] != kernels["levels"][-1]:
        notes.append(f"MOESTRO_KERNELS holds the kernels at {kernels['level']}; this machine could use {kernels['levels'][-1]}")
    if len(kernels["levels"]) == 1:
        notes.append(
            "the native kernels are not installed: everything works, but slower; install a C++ compiler "
            "(apt install g++, or xcode-select --install) and run `pip install --force-reinstall --no-deps moestro` again"
        )
    missing = [name for name in LAB if report["packages"][name] is None]
    if missing:
        notes.append(f"not installed: {', '.join(missing)}; `pip install 'moestro[lab]'` brings the whole workbench")
    if (report["read_ahead_bytes"] or 0) > 1 << 20:
        notes.append(
            f"the disk's read-ahead is {size(report['read_ahead_bytes'])}: moestro reads around it, but programs that map "
            "their files (llama.cpp, transformers' offload) read much more than they need; the usual value is 128 KiB"
        )
    return notes


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    kernels, packages = report["kernels"], report["packages"]
    lines = [
        ("moestro", f"{report['moestro']} on Python {report['python']}, {report['machine']}, {report['cores']} cores"),
        ("kernels", f"{kernels['level']}, of {', '.join(kernels['levels'])}"),
        ("runtime", ", ".join(f"{n} {packages[n] or 'MISSING'}" for n in LEAN)),
        ("lab", ", ".join(f"{n} {packages[n]}" for n in LAB if packages[n]) or "not installed"),
        ("memory", f"{size(report['memory_available'])} available, " + _limit(report["memory_limit"])),
    ]
    if report["memory_rate"]:
        lines.append(("memory rate", f"{report['memory_rate'] / 1e9:.1f} GB/s read by all cores"))
    where = report["folder"]
    if report["disk_rate"]:
        lines.append(("disk rate", f"{report['disk_rate'] / 1e9:.2f} GB/s in direct reads of {size(READ_BYTES)} at {where}"))
    if report["read_ahead_bytes"] is not None:
        lines.append(("read-ahead", f"{size(report['read_ahead_bytes'])} at {where}"))
    return lines


def _limit(limit: int | None) -> str:
    return "no cgroup limit" if limit is None else f"cgroup limit {size(limit)}"


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(doctor)
