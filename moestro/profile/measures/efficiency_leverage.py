"""Efficiency leverage: how much more compute a dense model would have needed for the same loss, by a published fit.

Paper      Tian et al. 2025, arXiv 2507.17702
Idea       One number for what sparsity buys in training, from activation ratio, granularity and compute.
Rule       A = active / all experts, shared ones counted in both; G = 2 d_model / d_expert; 1 / Ahat = 1 / (A + 1 / (1 / A_start - 1 / A_max))
           + 1 / A_max; EL = Ahat ** (a + d log10 C + gamma (log2 G)^2 + beta log2 G), C training FLOPs
Needs      the model's shape, no statistics
Gives      per activation ratio EL, the best G, and warnings where the fit was not made
Departs    the bases of the logarithms are not stated in the paper; log10 for C and log2 for G give its published figures
Checked    EL(3.1 %, 12, 1e22) = 7.25; 1 within 1.5 % at A = 1; best G = 11.3 for every A and C; falls with A
"""

from __future__ import annotations

import math

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.profile.finding import Finding, finding
from moestro.profile.profile import Profile

A, D, GAMMA, BETA, START, MOST = 1.23, -7.61e-2, 1.67e-2, -1.17e-1, 1.63e-2, 5.28e16
BEST_G = 2 ** (-BETA / (2 * GAMMA))


@method("profile.measures.efficiency_leverage", kind="measure", paper="2507.17702", fidelity="faithful")
def efficiency_leverage(profile: Profile, *, flops: float = 1e22, ratio: float = 0.0, granularity: float = 0.0) -> Finding:
    """flops: of training. ratio, granularity: A and G; by default the profiled model's."""
    layer = profile.layers[0]
    spec = layer["spec"]
    width = spec["d_expert"]
    shared = layer["shared"] / width
    own_ratio = (layer["top_k"] + shared) / (layer["num_experts"] + shared)
    used_ratio, used_g = ratio or own_ratio, granularity or 2 * spec["d_model"] / width
    value = leverage(used_ratio, used_g, flops)
    outside = [
        text
        for bad, text in (
            (not 1e18 <= flops <= 1e22, f"{flops:.3g} FLOPs are outside 1e18 to 1e22"),
            (not 0.008 <= used_ratio <= 0.3, f"an activation ratio of {used_ratio:.3g} is outside 0.8 % to about 30 %"),
            (not 2 <= used_g <= 32, f"a granularity of {used_g:.3g} is outside about 2 to 32"),
        )
        if bad
    ]
    notes = [
        "A fit to one family of models with tuned learning rate and batch, EL below 6 at 1e18 to 3e20 FLOPs, checked up to 7 at 1e22.",
        "It says what training compute is worth, nothing of memory or speed of inference.",
        *(f"LIMIT: {text}: extrapolated." for text in outside),
    ]
    row = (used_ratio, used_g, flops, value, BEST_G, leverage(used_ratio, BEST_G, flops))
    return finding(("activation_ratio", "granularity", "flops", "leverage", "best_granularity", "leverage_there"), [row], *notes)


def leverage(ratio: float, granularity: float, flops: float) -> float:
    """EL of the joint law. Raises InputError outside its domain."""
    if not 0 < ratio <= 1 or granularity <= 0 or flops <= 0:
        raise InputError(
            f"ratio {ratio}, granularity {granularity}, flops {flops}", expected="a ratio above 0, at most 1, and numbers above 0"
        )
    hat = 1 / (1 / (ratio + 1 / (1 / START - 1 / MOST)) + 1 / MOST)
    log_g = math.log2(granularity)
    return hat ** (A + D * math.log10(flops) + GAMMA * log_g**2 + BETA * log_g)
