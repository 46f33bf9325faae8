"""How a failure reaches the person: a message on stderr, an exit code, and a traceback only for those who ask."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

INTERRUPTED = 130


def bad_argument(found: str, expected: str = "", fix: str = "") -> NoReturn:
    """Raises InputError."""
    from moestro.core.errors import InputError

    raise InputError(found, expected=expected, fix=fix)


def debugging() -> bool:
    return os.environ.get("MOESTRO_LOG", "").lower() == "debug"


def report(error: BaseException) -> int:
    """Print `error` for people and return the exit code."""
    from moestro.core.errors import MoestroError

    if debugging():
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, MoestroError):
        print(f"moestro: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, ImportError) and error.name and error.name.split(".")[0] != "moestro":
        print(f"moestro: this needs the package {error.name}\n  to fix: pip install 'moestro[lab]'", file=sys.stderr)
        return 2
    if isinstance(error, MemoryError):
        print("moestro: out of memory\n  to fix: give a smaller --memory or a shorter --ctx-size", file=sys.stderr)
        return 2
    if isinstance(error, ValueError) and str(error).startswith("MOESTRO_KERNELS"):  # kernels know no MoestroError
        print(f"moestro: {error}", file=sys.stderr)
        return 2
    kind = type(error).__name__
    print(
        f"moestro: {kind}: {error}\n  to fix: run again with MOESTRO_LOG=debug for the traceback, and report it", file=sys.stderr
    )
    return 1
