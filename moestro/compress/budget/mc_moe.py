"""MC-MoE's pre-loading mixed precision: bits by an integer program over use, routing weight and the error of each width.

Paper      Huang et al. 2024, arXiv 2410.06270, section 3.2
Idea       Experts that are used often, weigh much and suffer from few bits get more of them; a small integer program finds the best choice.
Rule       per layer: min sum_e sum_b phi_e^alpha w_e^beta eps_eb^gamma x_eb;  sum_b x_eb = 1;  sum bytes_b x_eb <= the layer's share;
           with `present` at least one expert has the most bits and one the second most;  phi, w normalised to sum 1, eps = || change of the layer's output ||_F
Needs      the evidence of widths: counts, weights, output_LEW
Gives      the width of each expert
Departs    the budget is in bytes, scales included, where the paper counts code bits; that the two widest must occur is an option, for it
           can break a budget; with scope 'model' one program spans all layers, eps then as a share of what the layer's experts add, times
           their share of the residual stream where the profile was made with the probe residual; use and weight are of the tokens that
           the profile kept and of the weights that they are combined with, where the paper takes all tokens and the router's own weights
Checked    brute force over all choices; the presence of widths; a more important expert with the same errors never has fewer bits
"""

from __future__ import annotations

import numpy as np

from moestro.compress.budget.program import solve
from moestro.compress.evidence import BitsEvidence
from moestro.core.errors import InputError
from moestro.core.method import method

SCOPES = ("layer", "model")


@method("compress.budget.mc_moe", kind="bits", fidelity="adapted", paper="2410.06270", needs=("inputs",))
def mc_moe(
    evidence: BitsEvidence,
    budget: int,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
    scope: str = "layer",
    present: bool = False,
) -> np.ndarray:
    """widths_LE. budget: bytes of all experts. alpha, beta, gamma, scope: of the rule. present: whether the widest two must occur."""
    if scope not in SCOPES:
        raise InputError(f"the scope is {scope!r}", expected=" or ".join(SCOPES))
    evidence.check(budget)
    there_LE, error_LEW = evidence.there_LE, evidence.output_LEW
    widths = error_LEW.shape[2]
    share_LE = [
        x_LE / np.maximum(x_LE.sum(1, keepdims=True), 1e-30) for x_LE in (evidence.counts_LE.astype(float), evidence.weights_LE)
    ]
    if scope == "model":  # layers differ in the size of their output by orders
        error_LEW = error_LEW * evidence.worth()[:, None, None]
    loss_LEW = (share_LE[0] ** alpha * share_LE[1] ** beta)[..., None] * error_LEW**gamma
    bytes_LEW = np.broadcast_to(evidence.bytes_LW[:, None], loss_LEW.shape)
    widths_LE = np.zeros(there_LE.shape, np.int64)
    if scope == "model":
        widths_LE[there_LE] = solve(loss_LEW[there_LE], bytes_LEW[there_LE], budget)
        return widths_LE
    # Each layer has its part by the bytes that it would take in the fewest bits.
    least_L = np.array([evidence.bytes_LW[la, 0] * row.sum() for la, row in enumerate(there_LE)], float)
    for la, row_E in enumerate(there_LE):
        must = tuple(w for w in (widths - 1, widths - 2) if w > 0) if present and row_E.sum() >= 2 else ()
        widths_LE[la, row_E] = solve(
            loss_LEW[la, row_E], bytes_LEW[la, row_E], int(budget * least_L[la] / least_L.sum()), present=must
        )
    return widths_LE
