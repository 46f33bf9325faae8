"""Critical mixture ratio: the largest share of domain data in continued training that keeps the general loss.

Paper      Gu et al. 2024, arXiv 2407.17467
Idea       Short runs at a few mixtures tell by power laws which mixture a long run can bear.
Rule       Changes of validation loss from the start: domain(T) = a T^s + b, general(T) = a T^s + c T^u + b, fitted per share R. R is feasible
           if at some T <= horizon domain < 0 and general <= tolerance; the critical ratio is where the least general change, linear
           between the measured R, crosses the tolerance
Needs      curves of training runs in a JSON file: {"R": {"tokens": [...], "general": [...], "domain": [...]}, ...}; no profile
Gives      per R the fits' errors, the least general change while the domain gains, whether it is feasible; the critical ratio
Departs    the wording of the feasible set is inferred; between measured shares it is linear instead of a further power law
Checked    curves made by the laws give them back; rises with the tolerance; a dense grid by brute force
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile

POINTS = 8  # of a curve, the least that the two-term law is fitted to
Law = Callable[[np.ndarray], np.ndarray]


@method("profile.measures.critical_mixture_ratio", kind="measure", paper="2407.17467", fidelity="adapted")
def critical_mixture_ratio(profile: Profile, *, curves: str = "", tolerance: float = 0.05, horizon: float = 0.0) -> Finding:
    """The profile is not read. curves: the file. tolerance: nats. horizon: tokens; by default the longest curve's."""
    runs = read_curves(curves)
    longest = max(float(run["tokens"][-1]) for run in runs.values())
    horizon = horizon or longest
    rows, least = [], []
    for share, run in runs.items():
        domain, domain_error = fit(run["tokens"], run["domain"], terms=1)
        general, general_error = fit(run["tokens"], run["general"], terms=2)
        change = least_change(general, domain, run["tokens"][0], horizon)
        least.append(change)
        rows.append((share, domain_error, general_error, change, int(change <= tolerance)))
    ratio = crossing(np.array(list(runs)), np.array(least), tolerance)
    rows.append(("critical", None, None, None if ratio is None else tolerance, ratio))
    notes = [
        "least: smallest general change at a time when the domain has gained; inf: it never does. The last row's last cell is the ratio.",
        "Good for this model, these data, this learning rate and this tolerance only; larger models bear more. Only losses are looked at.",
    ]
    if horizon > longest:
        notes.append(f"LIMIT: the curves end at {longest:g} tokens and the horizon is {horizon:g}: extrapolated.")
    if ratio is not None and ratio == max(runs):
        notes.append("LIMIT: every measured share is feasible; the critical ratio is at or above the largest.")
    return finding(("share", "domain_error", "general_error", "least", "feasible"), rows, *notes)


def read_curves(path: str) -> dict[float, dict[str, np.ndarray]]:
    """Curves by share, ascending. Raises InputError."""
    if not path:
        raise InputError("there are no curves", expected="a JSON file", fix="--measure critical_mixture_ratio:curves=FILE")
    try:
        raw: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
        runs = {float(r): {k: np.asarray(run[k], np.float64) for k in ("tokens", "general", "domain")} for r, run in raw.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no curves: {error}", expected='{"0.25": {"tokens": [...], "general": [...], "domain": [...]}}'
        ) from error
    for share, run in runs.items():
        sizes = {len(values) for values in run.values()}
        if len(sizes) != 1 or min(sizes) < POINTS or not (np.diff(run["tokens"]) > 0).all() or run["tokens"][0] <= 0:
            raise InputError(
                f"the curves at {share:g} in {path} have {sorted(sizes)} points", expected=f"{POINTS} or more, at rising tokens"
            )
    if not runs or not all(0 < share < 1 for share in runs):
        raise InputError(f"{path} has the shares {sorted(runs)}", expected="shares between 0 and 1")
    return dict(sorted(runs.items()))


def fit(tokens: np.ndarray, change: np.ndarray, terms: int) -> tuple[Law, float]:
    """(law, root mean square error) of change = sum of a T^s over `terms` + b: the exponents by search, the rest by least squares."""
    from scipy.optimize import minimize

    scaled = tokens / tokens[-1]

    def solve(powers: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        basis = np.stack([*(scaled**p for p in powers), np.ones_like(scaled)], axis=1)
        factors = np.linalg.lstsq(basis, change, rcond=None)[0]
        return np.stack([*(at**p for p in powers), np.ones_like(at)], axis=1) @ factors, factors

    def error(powers: np.ndarray) -> float:
        return float(((solve(powers, scaled)[0] - change) ** 2).mean())

    starts = (
        [(s,) for s in (-1.0, -0.3, 0.3, 1.0)] if terms == 1 else [(s, u) for s in (-1.0, -0.4, 0.3) for u in (0.2, 0.6, 1.2)]
    )
    options = {"xatol": 1e-7, "fatol": 1e-16, "maxiter": 4000}
    bounds = [(-2.5, 2.5)] * terms
    found = [minimize(error, start, method="Nelder-Mead", bounds=bounds, options=options) for start in starts]
    best = min(found, key=lambda result: result.fun)
    return lambda at: solve(best.x, np.asarray(at, np.float64) / tokens[-1])[0], float(np.sqrt(max(0.0, best.fun)))


def least_change(general: Law, domain: Law, first: float, horizon: float, steps: int = 4000) -> float:
    """The least general change at a time up to the horizon when the domain's loss is below its start; infinite if it never is."""
    at = np.linspace(min(first, horizon), horizon, steps)
    gained = domain(at) < 0
    return float(general(at)[gained].min()) if gained.any() else float("inf")


def crossing(share_R: np.ndarray, least_R: np.ndarray, tolerance: float) -> float | None:
    """The largest share whose least change, linear between the given ones, is within the tolerance; None when none is."""
    inside = np.flatnonzero(least_R <= tolerance)
    if not len(inside):
        return None
    last = int(inside[-1])
    if last + 1 == len(share_R) or not np.isfinite(least_R[last + 1]):
        return float(share_R[last])
    step = (tolerance - least_R[last]) / (least_R[last + 1] - least_R[last])
    return float(share_R[last] + step * (share_R[last + 1] - share_R[last]))
