"""The error tree: every message says what was found, and the exit codes are the documented ones."""

from __future__ import annotations

import inspect

from moestro.core import errors


def test_a_message_has_up_to_three_parts():
    error = errors.InputError("it is 3", expected="2", fix="give 2")
    assert str(error).splitlines() == ["it is 3", "  expected: 2", "  to fix: give 2"]
    assert str(errors.InputError("it is 3")) == "it is 3"


def test_exit_codes():
    found = {n: c.exit_code for n, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, errors.MoestroError)}
    assert found.pop("CoverageError") == 1
    assert len(found) >= 8 and set(found.values()) == {2}


def test_a_budget_error_knows_the_smallest_budget():
    assert errors.BudgetError("too small", smallest=5).smallest == 5
