"""Bits by use: the experts that are chosen most often get more.

Paper      Li et al. 2024, arXiv 2406.08155 (one of the heuristics compared there)
Idea       What many tokens pass through should be precise.
Rule       experts by falling count of tokens get the most bits as long as the bytes last, all others the fewest
Needs      the evidence of widths: counts
Gives      the width of each expert, the first or the last
Departs    nothing
Checked    the order of counts; the bytes are spent as far as they go
"""

from __future__ import annotations

import numpy as np

from moestro.compress.budget.quantmoe_bench import by_rank
from moestro.compress.evidence import BitsEvidence
from moestro.core.method import method


@method("compress.budget.frequency", kind="bits", fidelity="faithful", paper="2406.08155", needs=("inputs",))
def frequency(evidence: BitsEvidence, budget: int) -> np.ndarray:
    """widths_LE. budget: bytes of all experts."""
    return by_rank(evidence, budget, evidence.counts_LE.astype(float))
