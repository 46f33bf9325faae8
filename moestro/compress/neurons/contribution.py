"""Contribution: a neuron is worth what it adds to the expert's weighted output.

Paper      Sun et al. 2023, arXiv 2306.11695 (Wanda's score), summed over the neuron's column
Idea       A neuron is an input of the last projection: how strongly it fires, with the weight its expert is given, times what is made of it.
Rule       score_f = sqrt(sum_t (g(t) h_f(t))^2) |W_down,:f|; an expert that saw no token: |W_up,f| |W_down,:f|
Needs      moments
Gives      scores_F
Departs    Wanda scores single weights within rows; here whole neurons of an expert
Checked    closed form; planted dead neurons go first; keeping all changes nothing
"""

from __future__ import annotations

import numpy as np

from moestro.core.experts import ExpertWeights
from moestro.core.method import method


@method("compress.neurons.contribution", kind="neurons", paper="2306.11695", needs=("moments", "counts"), fidelity="adapted")
def contribution(norm_F: np.ndarray, weights: ExpertWeights) -> np.ndarray:
    """float64 scores_F. norm_F: sqrt of the sum of (g h_f)^2 over the expert's tokens."""
    out_F = np.linalg.norm(weights.down_DF.astype(np.float64), axis=0)
    return (norm_F if norm_F.any() else np.linalg.norm(weights.up_FD.astype(np.float64), axis=1)) * out_F
