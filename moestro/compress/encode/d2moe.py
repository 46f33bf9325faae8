"""D2MoE's nested weights: two bits inside three inside four, where rounding a block is made good by the blocks behind it.

Paper      Wang et al. 2025, arXiv 2504.15299
Idea       One set of bytes serves three widths: a base of two bits and, for each further bit, the sign of what is left. Blocks of inputs are
           encoded one after another, and each block's error is compensated in those behind it, as GPTQ does, but for whole blocks.
Rule       `planes` bits: even levels of the range whose error, weighed by 1 / U_jj^2, is least, its first two bits the base and each further
           one a plane of half the step; plane k beyond: B = sign(R), s_k = mean |R|, R what is left by the planes before;
           behind block J: W -= (W_J - W'_J) (U_JJ)^-1 U_J,rest with U^T U = (mean of x x^T + damp mean(diag) I)^-1, W' with `planes` bits
Needs      inputs of the matrix
Gives      tiles of the codec nested:G with all planes
Departs    what is compensated is the error at the width `planes`, which the paper leaves open; so is the range fitted, where the paper fits
           it for two bits: that leaves planes of signs to reach for what the two bits cut off, and four bits three times the squared error;
           planes=2 fits the two bits
Checked    every further plane leaves less squared error; less output error than without compensation at that width; fitted for four
           bits, four bits err less than fitted for two, and two bits more
"""

from __future__ import annotations

import numpy as np

from moestro.compress.encode.grids import grid_of
from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.kernels.packed import TILE, Packed, assemble, part_sizes
from moestro.models.codecs.encode import PLANES, Codec, parse_codec


@method("compress.encode.d2moe", kind="encode", fidelity="adapted", paper="2504.15299", needs=("inputs",))
def d2moe(
    w_RC: np.ndarray, inputs: Inputs | None = None, *, codec: str = "nested:64", planes: int = 4, damp: float = 0.01
) -> Packed:
    """planes: 2, 3 or 4, the width whose errors are least and compensated. Raises InputError without inputs or for another width."""
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
    weight_C = (1 / np.diag(upper_CC) ** 2).astype(np.float32)
    w_RC = np.array(w_RC, np.float32)
    units = []
    for start in range(0, cols, group):
        block = slice(start, start + group)
        parts, away_RG = _block(np.ascontiguousarray(w_RC[:, block]), weight_C[block], made._replace(planes=planes))
        units.append([part.reshape(-(-rows // TILE), -1) for part in parts])
        error_RG = solve_triangular(upper_CC[block, block], away_RG.T, trans=1).T
        w_RC[:, block.stop :] -= error_RG @ upper_CC[block, block.stop :]
    parts = tuple(np.ascontiguousarray(np.concatenate(column, axis=1)).reshape(-1) for column in zip(*units, strict=True))
    return Packed(parts, "nested", group, rows, cols)


def _block(w_RG: np.ndarray, weight_G: np.ndarray, codec: Codec) -> tuple[list[np.ndarray], np.ndarray]:
    """(the base and all planes of one group of every row, what is left of the weights at the codec's width)."""
    grid = grid_of(codec)
    range_ = grid.fit(w_RG, weight_G)
    fitted = grid.lay(grid.codes(w_RG, range_), range_)
    away_RG = w_RG - fitted.dequantise()
    parts, left_RG = list(fitted.parts), away_RG
    for part in range(len(parts), len(PLANES)):
        scale_R1 = np.abs(left_RG).mean(1, keepdims=True).astype(np.float16)
        up_RG = left_RG >= 0
        nothing_RG, nothing_R1 = np.zeros(w_RG.shape, np.uint8), np.zeros(scale_R1.shape, np.uint8)
        plane = up_RG.astype(np.uint8), scale_R1
        parts.append(assemble(nothing_RG, "nested", codec.group, scale_R1, nothing_R1, [plane, plane]).parts[part])
        left_RG = left_RG - np.where(up_RG, scale_R1, -scale_R1)
    return parts, away_RG
