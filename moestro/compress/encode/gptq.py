"""GPTQ: what rounding one input's weights does to the output is made good by the weights that are not rounded yet.

Paper      Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv 2210.17323
Idea       Column after column is rounded; the error, seen through the second moment of the inputs, is spread over the later columns so
           that the layer's output changes least.
Rule       H = mean of x x^T + damp mean(diag) I;  H^-1 = U^T U, U upper;  e_j = (w_j - q(w_j)) / U_jj;  w_k -= e_j U_jk for k > j;
           a group's range is fitted to the weights as they are when its first column is reached, errors weighed by 1 / U_jj^2.
           `ordered`: columns by falling H_jj, each group's range fitted beforehand, errors weighed by H_jj
Needs      inputs of the matrix
Gives      tiles in the codec
Departs    nothing for the columns' order and updates; ranges are searched for (21 shrunken ones) where the authors' code takes the plain
           minimum and maximum unless asked. Ordered, the ranges are of the weights as they were (the authors' static groups), so that
           groups stay side by side and nothing has to say where a column went
Checked    independent inputs give round-to-nearest; two columns against the closed form; less output error than round-to-nearest;
           ordered, the large inputs' weights err least, and output errs less where inputs differ much in size
"""

from __future__ import annotations

import numpy as np

from moestro.compress.encode.grids import Grid, Range, grid_of
from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.kernels.packed import Packed

BLOCK = 128  # columns whose updates of what lies behind them are done at once


@method("compress.encode.gptq", kind="encode", fidelity="faithful", paper="2210.17323", needs=("inputs",))
def gptq(
    w_RC: np.ndarray, inputs: Inputs | None = None, *, codec: str = "int4:64", damp: float = 0.01, ordered: bool = False
) -> Packed:
    """damp: added to the diagonal, as a share of its mean. ordered: round the largest inputs' columns first.

    Raises InputError without inputs or for moments that are no moments.
    """
    if inputs is None:
        raise InputError("GPTQ needs what the matrix is multiplied with", fix="use encode.hqq or encode.rtn, or give a profile")
    grid = grid_of(codec)
    if not ordered:
        return grid.lay(*rounded(w_RC, inputs.factor(damp), grid))
    size_C = np.diag(inputs.moment_CC)
    return grid.lay(*rounded(w_RC, inputs.factor(damp, ordered=True), grid, order_C=inputs.order, size_C=size_C))


def rounded(
    w_RC: np.ndarray, upper_CC: np.ndarray, grid: Grid, *, order_C: np.ndarray | None = None, size_C: np.ndarray | None = None
) -> tuple[np.ndarray, Range]:
    """(codes [R, C], range of each group). order_C: the columns in the order of upper_CC; size_C: what their errors weigh in fitting
    the ranges, in the order of w_RC. Works on the transpose, where a column's weights lie side by side.
    """
    w_CR = np.array(w_RC.T, np.float32, order="C")
    cols, rows = w_CR.shape
    codes_CR = np.empty_like(w_CR)
    scale_BR, offset_BR = np.empty((2, cols // grid.group, rows), np.float32)
    weight_C = (1 / np.diag(upper_CC) ** 2).astype(np.float32)

    def fit(column: int, weight_C: np.ndarray) -> None:
        inside = slice(column, column + grid.group)
        range_ = grid.fit(np.ascontiguousarray(w_CR[inside].T), weight_C[inside])
        scale_BR[column // grid.group], offset_BR[column // grid.group] = range_

    if order_C is not None:
        assert size_C is not None, "ranges that are fitted beforehand weigh errors by the inputs' size"
        for column in range(0, cols, grid.group):
            fit(column, size_C.astype(np.float32))
        w_CR = np.ascontiguousarray(w_CR[order_C])
    step = BLOCK // grid.group * grid.group
    for start in range(0, cols, step):
        stop = min(start + step, cols)
        error_JR = np.empty((stop - start, rows), np.float32)
        for j in range(start, stop):
            if order_C is None and j % grid.group == 0:
                fit(j, weight_C)
            column = j if order_C is None else int(order_C[j])
            unit_R, first_R = _levels(grid, Range(scale_BR[column // grid.group], offset_BR[column // grid.group]))
            safe_R = np.where(unit_R == 0, np.float32(1), unit_R)
            code_R = np.clip(np.rint((w_CR[j] - first_R) / safe_R), 0, grid.levels - 1)
            codes_CR[column] = code_R
            error_R = (w_CR[j] - (code_R * unit_R + first_R)) / upper_CC[j, j]
            error_JR[j - start] = error_R
            w_CR[j + 1 : stop] -= upper_CC[j, j + 1 : stop, None] * error_R
        if stop < cols:
            w_CR[stop:] -= upper_CC[start:stop, stop:].T @ error_JR
    return np.ascontiguousarray(codes_CR.T), Range(np.ascontiguousarray(scale_BR.T), np.ascontiguousarray(offset_BR.T))


def _levels(grid: Grid, range_: Range) -> tuple[np.ndarray, np.ndarray]:
    """(distance of two levels, the first level) of each group."""
    return range_.scale_N * np.float32(grid.step), range_.scale_N * np.float32(grid.base) + range_.offset_N
