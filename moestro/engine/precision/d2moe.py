"""D2MoE: hot experts with all their bits, cold ones with their first bits only, all in one nested set of weights.

Paper      Wang et al. 2025, arXiv 2504.15299
Idea       2 bits inside 3 inside 4: one copy on disk serves every width, and what few tokens use is read at few bits.
Rule       all experts begin with all planes; the plane whose tokens x error reduction per byte is the smallest goes first, an expert's higher
           plane before its lower one; as many go as the bound allows (bisection)
Needs      harm and counts of each expert with each number of planes on a text; a judge that runs the model
Gives      the width of each expert, or None when all planes are not within the bound
Departs    an expert has one width for all tokens, from a profile: the paper trains a router that picks one for each token; weights are fitted
           without calibration data, where the paper compensates errors block by block as GPTQ does
Checked    an expert's planes go from the highest down; the last step within a known bound is found, and the next one is outside it
"""

from __future__ import annotations

import heapq

import numpy as np

from moestro.core.method import method
from moestro.engine.precision.search import Evidence, Judge, furthest


@method("engine.precision.d2moe", kind="precision", fidelity="adapted", paper="2504.15299", needs=("harm", "nested"))
def d2moe(evidence: Evidence, judge: Judge) -> np.ndarray | None:
    """widths_LE, the widths of `evidence` by their index; each holds the planes of the one below it and one more."""
    shape, top = evidence.counts_LE.shape, evidence.harm_LEW.shape[2] - 1
    if not judge(np.full(shape, top)):
        return None
    order = removals(evidence)

    def step(taken: int) -> np.ndarray:
        widths_LE = np.full(shape, top)
        np.subtract.at(widths_LE.reshape(-1), order[:taken], 1)
        return widths_LE

    return step(furthest(lambda taken: judge(step(taken)), len(order)))


def removals(evidence: Evidence) -> list[int]:
    """Experts (flat indices) in the order in which each loses its highest plane; every expert appears once for each plane it can lose."""
    harm_NW = evidence.harm_LEW.reshape(-1, evidence.harm_LEW.shape[2])  # summed over tokens: hot experts weigh more
    bytes_NW = evidence.bytes_LEW.reshape(harm_NW.shape)
    top = harm_NW.shape[1] - 1

    def cost(expert: int, width: int) -> float:
        saved = bytes_NW[expert, width] - bytes_NW[expert, width - 1]
        return float(max(0.0, harm_NW[expert, width - 1] - harm_NW[expert, width]) / max(1, saved))

    heap = [(cost(n, top), n, top) for n in range(len(harm_NW))] if top else []
    heapq.heapify(heap)
    order = []
    while heap:
        _, expert, width = heapq.heappop(heap)
        order.append(expert)
        if width > 1:
            heapq.heappush(heap, (cost(expert, width - 1), expert, width - 1))
    return order
