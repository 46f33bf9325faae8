"""The integer program that the methods of mixed precision share: one width for each expert, least loss, within bytes. Solved by HiGHS."""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError


def solve(loss_NW: np.ndarray, bytes_NW: np.ndarray, budget: int, *, present: tuple[int, ...] = ()) -> np.ndarray:
    """width_N of least summed loss whose bytes fit the budget. present: widths that at least one expert must have.

    Ties, and what makes no difference to HiGHS's tolerance of the objective, are broken by the solver, the same way each time.
    Raises InputError when nothing fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, eye_array, kron

    count, widths = loss_NW.shape
    one_each = kron(eye_array(count), np.ones((1, widths)))
    scale = float(loss_NW.max()) or 1.0
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(bytes_NW.reshape(1, -1).astype(float)), -np.inf, budget),
    ]
    for w in present:
        row = np.zeros((count, widths))
        row[:, w] = 1
        limits.append(LinearConstraint(csr_array(row.reshape(1, -1)), 1, np.inf))
    done = milp(
        loss_NW.reshape(-1) / scale,
        integrality=np.ones(count * widths),
        bounds=Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if done.x is None:
        raise InputError(
            f"no choice of widths fits {budget} bytes" + (" with each of the widths that must occur" if present else ""),
            expected=f"at least {int(bytes_NW.min(1).sum())} bytes",
            fix="allow more bytes, or offer fewer bits",
        )
    return done.x.reshape(count, widths).argmax(1)
