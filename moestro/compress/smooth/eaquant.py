"""EAQuant's smoothing: one scale per input for all experts and the router, and calibration tokens topped up for rare experts.

Paper      Fu et al. 2025, arXiv 2506.13329
Idea       A few channels are far larger than others and spoil the rounding of those beside them. Dividing channels by a scale, and what they
           are multiplied with multiplied by it, changes nothing but the rounding; since one norm feeds all experts, they share one scale.
Rule       s_j^e = max_t |x_tj|^alpha / max(|W_gate,:j|, |W_up,:j|)^(1 - alpha), t of the tokens routed to e, likewise of the router;
           s_j = max_e s_j^e. Hidden units beyond q3 + 1.5 (q3 - q1) of their largest sizes: t_f = (max_f / largest within)^power, else 1.
           An expert with fewer than balance k N / E of the first N = `base` kept tokens gets more of its own from the rest, up to that many
Needs      inputs
Gives      scale_D, hidden_SF and the tokens that each expert is fitted to
Departs    scales are rounded to powers of two, so that absorbing them rounds nothing: the model with them is the same to the last bit where
           no product is summed in another order; the authors' rotations are left out; the cut for hidden units is the quartiles', not Otsu's
Checked    the logits do not change; a planted outlier channel costs less with it than without; every expert has min(threshold, available)
           tokens, and a rare one's error falls with them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moestro.compress.calibration import LayerInputs
from moestro.compress.encode.inputs import hidden
from moestro.compress.smooth.smoothing import Smoothing
from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.method import method
from moestro.core.plans.compression import Slot

_LEAST = 1e-5  # sizes below count as this
_MOST = 10  # scales are 2^-10 to 2^10


@method("compress.smooth.eaquant", kind="smooth", fidelity="adapted", paper="2506.13329", needs=("inputs",))
def eaquant(
    seen: LayerInputs,
    slots: Sequence[Slot],
    read: Callable[[int], ExpertWeights],
    router_ED: np.ndarray,
    spec: ExpertSpec,
    *,
    alpha: float = 0.6,
    power: float = 0.7,
    router: bool = True,
    balance: float = 2.0,
    base: int = 2048,
) -> Smoothing:
    """read: the weights of a slot by its number. alpha, power, balance, base: of the rule. router: whether it has a say in the scale.

    Raises InputError for numbers outside of 0 to 1 (alpha, power) or not above 0 (balance, base).
    """
    if not (0 <= alpha <= 1 and 0 <= power <= 1 and balance > 0 and base > 0):
        raise InputError(
            f"alpha {alpha}, power {power}, balance {balance}, base {base}",
            expected="alpha and power from 0 to 1, balance and base above 0",
        )
    rows = balanced(seen, slots, balance, base)
    wanted = [_scale(seen.x_nD, np.abs(router_ED).max(0), alpha)] if router else []
    hidden_SF = []
    for number, own_n in enumerate(rows):
        weights = read(number)
        x_nD = seen.x_nD[own_n]
        size_D = np.abs(weights.up_FD).max(0)
        if weights.gate_FD is not None:
            size_D = np.maximum(size_D, np.abs(weights.gate_FD).max(0))
        if len(own_n):
            wanted.append(_scale(x_nD, size_D, alpha))
        if spec.gated and weights.up_F is None:
            hidden_SF.append(outliers(hidden(x_nD, weights, spec), power))
        else:  # what a hidden unit is divided by must pass through
            hidden_SF.append(np.ones(len(weights.up_FD), np.float32))
    scale_D = np.max(wanted, axis=0) if wanted else np.ones(seen.x_nD.shape[1])
    return Smoothing(powers_of_two(scale_D), tuple(hidden_SF), tuple(rows))


def balanced(seen: LayerInputs, slots: Sequence[Slot], balance: float, base: int) -> list[np.ndarray]:
    """rows of each slot: its tokens among `base` evenly spaced ones and, where these are too few, more of its own, evenly spaced."""
    tokens, used = seen.experts_nK.shape
    first_n = np.zeros(tokens, bool)
    first_n[np.linspace(0, tokens - 1, min(base, tokens)).astype(int)] = True
    enough = int(np.ceil(balance * used * first_n.sum() / len(slots)))
    out = []
    for slot in slots:
        own_n = seen.own(slot.sources)
        there, more = own_n[first_n[own_n]], own_n[~first_n[own_n]]
        if (missing := min(enough - len(there), len(more))) > 0:
            there = np.sort(np.concatenate([there, more[np.arange(missing) * len(more) // missing]]))
        out.append(there)
    return out


def outliers(hidden_nF: np.ndarray, power: float) -> np.ndarray:
    """scale_F of hidden units: 1, and above 1 for those far larger than the others."""
    if not len(hidden_nF):
        return np.ones(hidden_nF.shape[1], np.float32)
    top_F = np.abs(hidden_nF).max(0)
    low, high = np.quantile(top_F, (0.25, 0.75))
    beyond_F = top_F > high + 1.5 * (high - low)
    normal = max(float(top_F[~beyond_F].max(initial=0)), _LEAST)
    return powers_of_two(np.where(beyond_F, np.maximum(top_F / normal, 1) ** power, 1))


def powers_of_two(values: np.ndarray) -> np.ndarray:
    """The nearest, by ratio, as float32."""
    return np.exp2(np.clip(np.rint(np.log2(np.maximum(values, 2.0**-_MOST))), -_MOST, _MOST)).astype(np.float32)


def _scale(x_nD: np.ndarray, size_D: np.ndarray, alpha: float) -> np.ndarray:
    top_D = np.abs(x_nD).max(0)
    return np.maximum(top_D, _LEAST) ** alpha / np.maximum(size_D, _LEAST) ** (1 - alpha)
