"""Half-quadratic quantisation: offsets that bear a few large weights, found without any data.

Paper      Badri, Shaji 2023 (mobiusml.github.io/hqq_blog); no arXiv number
Idea       The error is split into a sparse part, which large weights cause, and the rest; alternating between the two moves each group's
           offset to where most weights lie well.
Rule       e = shrink(w - w', beta) with shrink(x) = sign(x) max(0, |x| - |x|^(p - 1) / beta); m = mean(w - e - s (step u + base)) over the group;
           u again; beta *= kappa; stops when the mean |w - w'| no longer falls
Needs      nothing
Gives      tiles in a codec with an offset: uint4, nested:G/2, /3 and /4
Departs    the range it begins with is fitted, not the plain minimum and maximum; the codec rounds the offset; weights are measured in levels
Checked    the mean absolute error never grows against where it began; a planted outlier harms less than with round-to-nearest
"""

from __future__ import annotations

import numpy as np

from moestro.compress.encode.grids import Range, by_groups, grid_of
from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.kernels.packed import Packed


@method("compress.encode.hqq", kind="encode", fidelity="adapted")
def hqq(
    w_RC: np.ndarray,
    inputs: Inputs | None = None,
    *,
    codec: str = "uint4:64",
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    steps: int = 20,
) -> Packed:
    """inputs are not used. p, beta, kappa: of the rule. steps: the most there are. Raises InputError for a codec without an offset."""
    grid = grid_of(codec)
    if grid.kind not in ("minimum", "zero"):
        raise InputError(
            f"{codec} has no offset to fit", expected="uint4:G, nested:G/2, /3 or /4", fix="use encode.rtn with --search"
        )
    w_NG = by_groups(np.ascontiguousarray(w_RC, np.float32), grid.group)
    range_ = grid.fit(w_NG)
    codes_NG = grid.codes(w_NG, range_)
    best_N = np.abs(w_NG - grid.values(codes_NG, range_)).mean(-1)
    kept, kept_NG = range_, codes_NG
    unit_N1 = range_.scale_N[:, None]
    # The size at which a weight counts as large is measured in levels, so that the result does not depend on the weights' unit.
    safe_N1 = np.where(unit_N1 == 0, np.float32(1), np.abs(unit_N1) * np.float32(grid.step))
    for _ in range(steps):
        away_NG = (w_NG - grid.values(codes_NG, range_)) / safe_N1
        size_NG = np.abs(away_NG)
        with np.errstate(divide="ignore"):
            sparse_NG = np.sign(away_NG) * np.maximum(0, size_NG - size_NG ** (p - 1) / beta) * safe_N1
        wanted_N = (w_NG - sparse_NG - unit_N1 * (np.float32(grid.step) * codes_NG + np.float32(grid.base))).mean(-1)
        range_ = Range(range_.scale_N, grid.offset(wanted_N, range_.scale_N))
        codes_NG = grid.codes(w_NG, range_)
        error_N = np.abs(w_NG - grid.values(codes_NG, range_)).mean(-1)
        better_N = error_N < best_N
        if not better_N.any():
            break
        best_N = np.where(better_N, error_N, best_N)
        kept = Range(range_.scale_N, np.where(better_N, range_.offset_N, kept.offset_N))
        kept_NG = np.where(better_N[:, None], codes_NG, kept_NG)
        beta *= kappa
    return grid.lay(kept_NG.reshape(w_RC.shape), kept)
