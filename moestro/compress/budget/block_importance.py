"""QuantMoE-Bench's block importance: the layers that turn the residual stream most get more bits.

Paper      Li et al. 2024, arXiv 2406.08155
Idea       A block whose output points where its input does could almost be left out, so it bears few bits; one that turns its input does not.
Rule       score_l = 1 - mean cos(input, output) of the block; the layers of highest score get the most bits as long as the bytes last, all
           others the fewest
Needs      the evidence of widths: turned_L
Gives      the width of each expert, the first or the last
Departs    the cosine is measured on the profiled tokens, where the paper trains a small network to foretell it; the block is the routed
           experts with the residual stream around them, for only they get bits here; of the last layer the bytes reach, some experts
Checked    a planted layer that turns the stream comes first; the bytes are spent as far as they go; without the measure it says so
"""

from __future__ import annotations

import numpy as np

from moestro.compress.budget.quantmoe_bench import by_rank
from moestro.compress.evidence import BitsEvidence
from moestro.core.errors import InputError
from moestro.core.method import method


@method("compress.budget.block_importance", kind="bits", fidelity="adapted", paper="2406.08155", needs=("inputs", "residual"))
def block_importance(evidence: BitsEvidence, budget: int) -> np.ndarray:
    """widths_LE. budget: bytes of all experts. Raises InputError when it was not measured how layers turn the stream."""
    if evidence.turned_L is None:
        raise InputError(
            "the profile does not say how each layer turns the residual stream",
            expected="one made with the probe residual",
            fix="moestro profile MODEL DATA --probe inputs --probe residual -o FILE",
        )
    return by_rank(evidence, budget, np.broadcast_to(evidence.turned_L[:, None], evidence.there_LE.shape))
