"""Which native code runs: the extension is optional, and `MOESTRO_KERNELS` forces one level (`numpy` switches it off)."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

LEVELS = ("numpy", "scalar", "neon", "neondot", "avx2", "avxvnni", "avx512", "avx512vnni", "amx")


@functools.cache
def extension() -> Any:
    """The compiled module set to the level in force, or None where numpy does the work.

    Raises:
        ValueError: `MOESTRO_KERNELS` names a level that does not exist or that this machine or installation lacks.
    """
    forced = os.environ.get("MOESTRO_KERNELS", "").strip().lower()
    if forced and forced not in LEVELS:
        raise ValueError(f"MOESTRO_KERNELS={forced} is not a level; expected one of {', '.join(LEVELS)}")
    if forced == "numpy":
        return None
    try:
        module = importlib.import_module("moestro.kernels._native")
    except ImportError:
        if forced:
            raise ValueError(
                f"MOESTRO_KERNELS={forced}, but the native code is not installed; install a C++ compiler and reinstall moestro"
            ) from None
        return None
    if forced and forced not in module.levels():
        raise ValueError(f"MOESTRO_KERNELS={forced}, but this machine has {', '.join(['numpy', *module.levels()])}")
    module.set_level(forced or module.levels()[-1])
    return module


def available() -> bool:
    """Whether native code is installed and not switched off."""
    return extension() is not None


def level() -> str:
    """'numpy', or the instruction set of the native kernels, one of LEVELS."""
    module = extension()
    return "numpy" if module is None else module.level()


def levels() -> tuple[str, ...]:
    """Every level that this machine and installation can run, slowest first."""
    try:
        module = importlib.import_module("moestro.kernels._native")
    except ImportError:
        return ("numpy",)
    return ("numpy", *module.levels())


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
