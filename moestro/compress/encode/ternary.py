"""Ternary weights: minus one, zero or plus one times a scale of their group.

Paper      Li, Liu 2016, arXiv 1605.04711 (Ternary Weight Networks)
Idea       Weights near zero become zero, the others keep their sign; one scale per group is the mean of those that are kept.
Rule       of every number k of largest |w| kept: s = their mean, error = sum w^2 - k s^2; the k of least error
Needs      nothing
Gives      tiles of two bits whose levels are -s, 0, s (the codec nested:G/2 with its zero in the middle)
Departs    the best k is found exactly, by sorting, where the paper sets a threshold of 0.7 mean |w|
Checked    no other choice of kept weights has less error: against all choices for small groups
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moestro.compress.encode.grids import by_groups
from moestro.compress.encode.inputs import Inputs
from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.kernels.packed import Packed, assemble
from moestro.models.codecs.encode import parse_codec

_MIDDLE = 64  # the zero of the tiles is in 64ths of the scale: the code 1 stands for 0


@method("compress.encode.ternary", kind="encode", fidelity="adapted", paper="1605.04711")
def ternary(w_RC: np.ndarray, inputs: Inputs | None = None, *, codec: str = "nested:64/2") -> Packed:
    """inputs are not used: the same bytes with and without. Raises InputError for a codec that is not nested:G/2."""
    made = parse_codec(codec)
    if made.format != "nested" or made.planes != 2:
        raise InputError(f"ternary weights are not kept as {codec}", expected="nested:G/2")
    group = made.group
    w_NG = by_groups(np.ascontiguousarray(w_RC, np.float32), group)
    size_NG = np.abs(w_NG)
    falling_NG = -np.sort(-size_NG, axis=1)
    kept_G = np.arange(1, group + 1)
    sums_NG = falling_NG.cumsum(1)
    best_N1 = (sums_NG**2 / kept_G).argmax(1)[:, None]  # sum w^2 - k s^2 is least where (sum |w|)^2 / k is largest
    scale_N1 = (np.take_along_axis(sums_NG, best_N1, 1) / (best_N1 + 1)).astype(np.float16)
    keep_NG = size_NG >= np.take_along_axis(falling_NG, best_N1, 1)
    codes_NG = np.where(keep_NG, np.sign(w_NG), 0).astype(np.int8) + 1
    rows, cols = w_RC.shape
    scale_RB, codes_RC = scale_N1.reshape(rows, cols // group), codes_NG.astype(np.uint8).reshape(rows, cols)
    nothing = [(np.zeros_like(codes_RC), np.zeros_like(scale_RB))] * 2
    whole = assemble(codes_RC, "nested", group, scale_RB, np.full(scale_RB.shape, _MIDDLE, np.uint8), nothing)
    return replace(whole, parts=whole.parts[:1])
