"""Every error a user can meet. Each message says what was found, what was expected and what to do.

MoestroError            exit code 2
  InputError            an argument, a prompt or an option
  CheckpointError       a model's files: missing, truncated, lying, wrong dtype, not-a-number
  UnsupportedModel      a model moestro cannot run with parity
  BudgetError           a memory budget that cannot work; `.smallest` is the least that can
  PlanError             a plan that does not fit the model or its files
  TraceError            a trace that cannot be read
  ProfileError          a profile that cannot be read, or lacks what is asked of it
  StorageError          disk full, read-only target
  CoverageError         something would be skipped or dropped; exit code 1 unless allowed
"""

from __future__ import annotations


class MoestroError(Exception):
    """Base of all errors meant for the user.

    Args:
        found: what is there, concretely (names, numbers).
        expected: what had to be there.
        fix: what the user can do, if possible as a command.
    """

    exit_code = 2

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found]
        if expected:
            parts.append(f"expected: {expected}")
        if fix:
            parts.append(f"to fix: {fix}")
        super().__init__("\n  ".join(parts))


class InputError(MoestroError, ValueError):
    """An argument, a prompt or an option that cannot be used."""


class CheckpointError(MoestroError):
    """A model's files are missing, truncated, inconsistent or hold values that cannot be right."""


class UnsupportedModel(MoestroError):
    """A model that moestro cannot run with parity, so it refuses."""


class BudgetError(MoestroError):
    """A memory budget that cannot work. `smallest` is the least number of bytes that can, if known."""

    def __init__(self, found: str, *, smallest: int | None = None, expected: str = "", fix: str = "") -> None:
        super().__init__(found, expected=expected, fix=fix)
        self.smallest = smallest


class PlanError(MoestroError):
    """A plan that does not fit the model, its files or this version."""


class TraceError(MoestroError):
    """A trace file that is truncated, of another version or of another model."""


class ProfileError(MoestroError):
    """A profile file that is truncated, of another version or of another model, or without the statistic asked for."""


class StorageError(MoestroError):
    """The target cannot be written: disk full, read-only, or in the way."""


class CoverageError(MoestroError):
    """Something would be skipped or dropped silently; allowed only by the flag the message names."""

    exit_code = 1
