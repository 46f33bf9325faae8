"""Round to nearest: every weight to the level next to it, group by group.

Paper      none; the baseline of every work on quantisation
Idea       A group of weights shares a scale (and, where the codec has one, an offset); each weight goes to its nearest level.
Rule       w' = s (step u + base) + m, u the nearest code; s and m by the rule of the codec's kernel (int8, int4, uint4, mxfp4: the group's
           range), or, with `search` and for planes of nested, from the one of 21 shrunken ranges whose squared error is the smallest
Needs      nothing
Gives      tiles in the codec: int8, int4, int3, int2 (symmetric), uint4, nested:G/2, nested:G/3 (with an offset), mxfp4, nested (all planes)
Departs    in no number; the trait `stored` says that weights may come as bf16 or float16 too, and give the bytes of the same in float32
Checked    every weight is within half a level of its own where the range is not shrunken; searching never adds squared error
"""

from __future__ import annotations

import numpy as np

from moestro.compress.encode.grids import by_groups, grid_of
from moestro.compress.encode.inputs import Inputs
from moestro.core.method import method
from moestro.kernels.convert import to_f32
from moestro.kernels.packed import Packed, quantise
from moestro.models.codecs.encode import PLANES, parse_codec


@method("compress.encode.rtn", kind="encode", fidelity="exact", traits=("stored",))
def rtn(w_RC: np.ndarray, inputs: Inputs | None = None, *, codec: str = "int4:64", search: bool = False) -> Packed:
    """inputs are not used: the same bytes with and without. search: fit the ranges; mxfp4 and whole nested codecs have rules of their own."""
    made = parse_codec(codec)
    if made.format == "mxfp4" or not (search or made.planes in (2, 3)) or made.planes == PLANES[-1]:
        return quantise(w_RC, made.format, made.group)
    grid = grid_of(made)
    w_NG = by_groups(np.ascontiguousarray(to_f32(w_RC)), grid.group)
    range_ = grid.fit(w_NG)
    return grid.lay(grid.codes(w_NG, range_).reshape(w_RC.shape), range_)
