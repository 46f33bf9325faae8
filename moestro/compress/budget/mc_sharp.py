"""MC#'s mixed precision: MC-MoE's integer program on the error of the weights themselves.

Paper      Huang et al. 2025, arXiv 2510.10962
Idea       As MC-MoE; the error of a width is that of rebuilding the expert's weights, for which no layer has to be run.
Rule       per layer: min sum_e sum_b phi_e^alpha w_e^beta ||W_e - W_eb||_F^gamma x_eb, under the constraints of MC-MoE
Needs      the evidence of widths: counts, weights, matrix_LEW
Gives      the width of each expert
Departs    as MC-MoE: bytes, and the scope 'model'; the powers are MC-MoE's, the paper's are not known
Checked    as MC-MoE
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moestro.compress.budget.mc_moe import mc_moe
from moestro.compress.evidence import BitsEvidence
from moestro.core.method import method


@method("compress.budget.mc_sharp", kind="bits", fidelity="adapted", paper="2510.10962", needs=("inputs",))
def mc_sharp(
    evidence: BitsEvidence,
    budget: int,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
    scope: str = "layer",
    present: bool = False,
) -> np.ndarray:
    """widths_LE. As `compress.budget.mc_moe`."""
    shown = replace(evidence, output_LEW=evidence.matrix_LEW, energy_L=None)  # a share of the layer's own change
    return mc_moe(shown, budget, alpha=alpha, beta=beta, gamma=gamma, scope=scope, present=present)
