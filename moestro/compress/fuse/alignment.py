"""Alignment: the neurons of one expert in the order in which they do most nearly what another's do.

Paper      Li et al. 2023, arXiv 2310.01334 (M-SMoE); the matching of Ainsworth et al. 2022, arXiv 2209.04836
Idea       An expert's neurons can be put in any order without changing it; averaging two experts only makes sense in a common order.
Rule       order maximises sum_f <gate0_f, gate_o(f)> + <up0_f, up_o(f)> + <down0_:f, down_:o(f)>, a linear assignment
Needs      weights of both experts
Gives      order_F: neuron f of the aligned expert is neuron order_F[f]
Departs    the gate's term is added for gated experts, which the paper's model does not have; biases are not looked at
Checked    finds a planted order exactly; an aligned expert computes what it computed; merging two equal up to order loses nothing
"""

from __future__ import annotations

import numpy as np

from moestro.core.experts import ExpertWeights
from moestro.core.method import method


@method("compress.fuse.alignment", kind="align", paper="2310.01334", needs=("checkpoint",), fidelity="adapted")
def align(first: ExpertWeights, other: ExpertWeights) -> np.ndarray:
    """int64 order_F."""
    from scipy.optimize import linear_sum_assignment

    gain_FF = first.up_FD @ other.up_FD.T + first.down_DF.T @ other.down_DF
    if first.gate_FD is not None and other.gate_FD is not None:
        gain_FF = gain_FF + first.gate_FD @ other.gate_FD.T
    return linear_sum_assignment(gain_FF, maximize=True)[1]
