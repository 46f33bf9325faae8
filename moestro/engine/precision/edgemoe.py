"""EdgeMoE: the experts that matter least get the fewer bits.

Paper      Yi et al. 2023, arXiv 2308.14352, section 4
Idea       Experts differ in how much the model loses when they have few bits. Two widths are enough: the smallest that is good enough
           for all experts, and the next smaller one for as many unimportant experts as the bound allows.
Rule       high = the smallest uniform width within the bound, low = the one below it; the K experts of least importance get low, for the
           largest K that stays within the bound (bisection)
Needs      harm and counts of each expert on a text; a judge that runs the model
Gives      the width of each expert, or None when even the largest uniform width is not within the bound
Departs    importance is the change of the layer's output when the expert alone has the low width, weighed by its routing weights, not the
           accuracy of a model run for each expert; weights share scales in groups, not in channels
Checked    a monotone loss with known parts: K is within, K + 1 is not; the least important experts are the ones taken
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.engine.precision.search import Evidence, Judge, furthest


@method("engine.precision.edgemoe", kind="precision", fidelity="adapted", paper="2308.14352", needs=("harm",))
def edgemoe(evidence: Evidence, judge: Judge) -> np.ndarray | None:
    """widths_LE, the widths of `evidence` by their index."""
    shape, widths = evidence.counts_LE.shape, evidence.harm_LEW.shape[2]
    uniform = next((w for w in range(widths) if judge(np.full(shape, w))), None)
    if uniform is None or uniform == 0:
        return None if uniform is None else np.zeros(shape, np.int64)
    order = np.argsort(evidence.harm_LEW[:, :, uniform - 1], axis=None, kind="stable")

    def step(taken: int) -> np.ndarray:
        widths_LE = np.full(shape, uniform)
        widths_LE.reshape(-1)[order[:taken]] = uniform - 1
        return widths_LE

    return step(furthest(lambda taken: judge(step(taken)), len(order) - 1))
