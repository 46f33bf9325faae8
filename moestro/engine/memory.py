"""What this process really uses, as the kernel counts it, and the settings that keep it from using more.

Two counts matter: the process's resident set (VmRSS, its peak VmHWM) and, inside a cgroup, what the kernel charges to it,
which includes page cache. The engine reads around the page cache, so that the two agree.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CGROUPS = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
FIRST_USE = 48 << 20  # a model's own class, its empty module and torch's code at the first pass: 25 to 42 MiB measured
LARGE = 1 << 20  # allocations of this size and more go back to the kernel as soon as they are freed


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes. resident, peak: of this process. charged, charged_peak, limit: of its cgroup; None outside one or without a limit."""

    resident: int
    peak: int
    charged: int | None = None
    charged_peak: int | None = None
    limit: int | None = None


def usage() -> Usage:
    """What is used now. Where there is no /proc (macOS) only the peak is known and stands for both."""
    try:
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        resident = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Usage(resident, peak, *cgroup())


def cgroup(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> tuple[int | None, int | None, int | None]:
    """(charged, peak, limit) in bytes of this process's memory cgroup, version 2 or 1; the limit is the tightest on the way up."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None, None, None
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.limit_in_bytes")
        elif not controllers:
            base, names = root, ("memory.current", "memory.peak", "memory.max")
        else:
            continue
        here = base / path.strip("/")
        if not (here / names[0]).exists():  # a container sees its own cgroup as the root
            here = base
        charged, peak, _ = (_number(here / name) for name in names)
        if charged is None:
            continue
        limits = [_number(folder / names[2]) for folder in (here, *here.parents) if folder.is_relative_to(base)]
        found = [n for n in limits if n is not None and n < 1 << 60]
        return charged, peak, min(found, default=None)
    return None, None, None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # 'max' is no number
        return None


def available() -> int:
    """Bytes this process could still take: the machine's available memory, or what its cgroup leaves if that is less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass
    charged, _, limit = cgroup()
    return free if limit is None or charged is None else max(0, min(free, limit - charged))


def settle() -> None:
    """Make malloc give memory back: large blocks straight to the kernel, few arenas, small top. Without glibc it does nothing.

    By default glibc raises its threshold as blocks are freed, up to 32 MiB, and then keeps what it got: a resident set that
    only grows. It costs a page fault per page of each large temporary.
    """
    libc = _libc()
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGE)
        libc.mallopt(M_ARENA_MAX, 2)


def trim() -> None:
    """Return malloc's free memory to the kernel."""
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def runtime_bytes(*, torch: bool = True) -> int:
    """What the runtime costs before any weight is loaded: this process's resident set once its libraries are in, in bytes.

    With `torch` they are torch and transformers, imported here if they were not yet, and what they take on first use is added.
    """
    if torch:
        for name in ("torch", "transformers.modeling_utils", "transformers.masking_utils"):
            importlib.import_module(name)
    trim()
    return usage().resident + (FIRST_USE if torch else 0)
