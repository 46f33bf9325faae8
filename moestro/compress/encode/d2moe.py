"""D2MoE's nested weights: two bits inside three inside four, where rounding a block is made good by the blocks behind it.

Paper      Wang et al. 2025, arXiv 2504.15299
Idea       One set of bytes serves three widths: a base of two bits and, for each further bit, the sign of what is left. Blocks of inputs are
           encoded one after another, and each block's error is compensated in those behind it, as GPTQ does, but for whole blocks.
Rule       base: four levels between the group's extremes; plane k: B = sign(R), s_k = mean |R|, R what is left by the planes before;
           behind block J: W -= (W_J - W'_J) (U_JJ)^-1 U_J,rest with U^T U = (mean of x x^T + damp mean(diag) I)^-1, W' with `planes` bits
Needs      inputs of the matrix
Gives      tiles of the codec nested:G with all planes
Departs    what is compensated is the error at the width `planes`, which the paper leaves open; the base's range is searched for
Checked    every further plane leaves no more squared error; less output error than without compensation at that width
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.kernels.packed import TILE, Packed, part_sizes, quantise
from moestro.models.codecs.encode import PLANES, parse_codec


@method("compress.encode.d2moe", kind="encode", fidelity="adapted", paper="2504.15299", needs=("inputs",))
def d2moe(
    w_RC: np.ndarray, inputs: Inputs | None = None, *, codec: str = "nested:64", planes: int = 4, damp: float = 0.01
) -> Packed:
    """planes: 2, 3 or 4, the width at which errors are compensated. Raises InputError without inputs or for another width."""
    if inputs is None:
        raise InputError("D2MoE's weights need what the matrix is multiplied with", fix="use encode.rtn with --codec nested:64")
    made = parse_codec(codec)
    if made.format != "nested" or made.planes != PLANES[-1]:
        raise InputError(f"D2MoE does not make {codec}", expected="nested:G, with all planes")
    group = made.group
    if planes not in PLANES:
        raise InputError(f"a nested weight has no width of {planes} bits", expected="2, 3 or 4")
    from scipy.linalg import solve_triangular

    rows, cols = w_RC.shape
    part_sizes(rows, cols, "nested", group)
    upper_CC = inputs.factor(damp)
    w_RC = np.array(w_RC, np.float32)
    units = []
    for start in range(0, cols, group):
        block = slice(start, start + group)
        block_made = quantise(np.ascontiguousarray(w_RC[:, block]), "nested", group)
        units.append([part.reshape(-(-rows // TILE), -1) for part in block_made.parts])
        away_RG = w_RC[:, block] - replace(block_made, parts=block_made.parts[: planes - 1]).dequantise()
        error_RG = solve_triangular(upper_CC[block, block], away_RG.T, trans=1).T
        w_RC[:, block.stop :] -= error_RG @ upper_CC[block, block.stop :]
    parts = tuple(np.ascontiguousarray(np.concatenate(column, axis=1)).reshape(-1) for column in zip(*units, strict=True))
    return Packed(parts, "nested", group, rows, cols)
