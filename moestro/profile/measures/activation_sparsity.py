"""Activation sparsity: the share of the active experts' neurons that are needed at a given error.

Paper      Luo et al. 2024, arXiv 2411.02335 (Sparsing Law)
Idea       How sparse a model could run is a matter of the error one allows, not of exact zeros.
Rule       Per layer the threshold where CETT = kappa, from the curve of the probe `sparsity`; activation ratio = kept neurons / neurons, mean
           over layers; sparsity = 1 - ratio; of all experts: ratio * k / E. PPL-p%: the kappa at which perplexity rises by p %
Needs      sparsity
Gives      a row per kappa, and one for PPL-p% if the profile was made with it
Departs    the threshold is interpolated on a grid; see the probe for CETT on experts
Checked    kappa 0 keeps all but exact zeros' neurons; never rises with kappa; the exact factor k / E; the search on a planted curve
"""

from __future__ import annotations

import numpy as np

from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile

KAPPAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


@method("profile.measures.activation_sparsity", kind="measure", paper="2411.02335", fidelity="adapted", needs=("sparsity",))
def activation_sparsity(profile: Profile, *, kappa: float = -1.0) -> Finding:
    """kappa: only this one; by default several."""
    share = float((profile.top_k_L / profile.experts_L).mean())
    rows = []
    for value in [kappa] if kappa >= 0 else KAPPAS:
        ratio = float(kept_at(profile, value).mean())
        rows.append((f"kappa {value:g}", ratio, 1 - ratio, ratio * share))
    if found := profile.info.get("ppl_sparsity"):
        ratio = found["ratio"]
        rows.append((f"PPL-{found['percent']:g}% (kappa {found['kappa']:.3g})", ratio, 1 - ratio, ratio * share))
    return finding(
        ("at", "active", "sparsity", "of_all_experts"),
        rows,
        "active: share of the routed experts' neurons. kappa: mean relative error of an expert's output when the others are skipped.",
    )


def thresholds(profile: Profile, kappa: float) -> np.ndarray:
    """threshold_L on |s_i| |W_down[:, i]| at which CETT is kappa: the largest of the grid that stays below it, and the way to the next."""
    tail_LQ, grid_Q = profile.need("sparsity", "tail_LQ"), profile.need("sparsity", "thresholds_Q")
    cett_LQ = _rising(tail_LQ / np.maximum(1, profile.need("sparsity", "tested_L"))[:, None])
    return np.array([grid_Q[0] if kappa <= 0 else np.interp(kappa, cett_Q, grid_Q) for cett_Q in cett_LQ])


def kept_at(profile: Profile, kappa: float) -> np.ndarray:
    """ratio_L of neurons kept at CETT = kappa. At 0 neurons that add exactly nothing are skipped."""
    tail_LQ, kept_LQ = profile.need("sparsity", "tail_LQ"), profile.need("sparsity", "kept_LQ")
    cett_LQ = _rising(tail_LQ / np.maximum(1, profile.need("sparsity", "tested_L"))[:, None])
    ratio_LQ = kept_LQ / np.maximum(1, profile.need("sparsity", "neurons_L"))[:, None]
    free_L = [ratio_Q[cett_Q <= 0].min() for ratio_Q, cett_Q in zip(ratio_LQ, cett_LQ)]
    if kappa <= 0:
        return np.array(free_L)
    return np.array([np.interp(kappa, cett_Q, ratio_Q) for cett_Q, ratio_Q in zip(cett_LQ, ratio_LQ)])


def _rising(cett_LQ: np.ndarray) -> np.ndarray:
    """A curve to invert: parts that fall, as summed vectors can cancel, are levelled."""
    return np.maximum.accumulate(cett_LQ, axis=1)
