"""EAQuant's router alignment: the router in few bits, clipped where its choice of experts suffers least.

Paper      Fu et al. 2025, arXiv 2506.13329
Idea       The router's smallest errors change which experts run, so its range is chosen by what it says of the experts that matter.
Rule       each row rounded to 2^bits levels between c min and c max of it; c the one of 101 from `least` to 1 of least mean
           KL(p || p'), p and p' the router's softmax over the m = k + floor(ratio (E - k)) experts that the original ranks highest
Needs      inputs
Gives      router_ED on that grid, in plain numbers
Departs    kept in the file's own type: the file does not shrink, it is as a runtime with routers of 8 bits would compute; always softmax,
           over the m experts alone; the bias of the choice, where there is one, is not looked at
Checked    the divergence is never above that of the unclipped range; a row has at most 2^bits values
"""

from __future__ import annotations

import numpy as np

from moestro.core.errors import InputError
from moestro.core.method import method

_TRIED = 101


@method("compress.smooth.aligned_router", kind="encode_router", fidelity="adapted", paper="2506.13329", needs=("inputs",))
def aligned_router(
    router_ED: np.ndarray, x_nD: np.ndarray, top_k: int, *, bits: int = 8, ratio: float = 0.0, least: float = 0.65
) -> np.ndarray:
    """float32 [E, D]. x_nD: what the router was given. Raises InputError for other than 2 to 8 bits, or shares outside of 0 to 1."""
    if not (2 <= bits <= 8 and 0 <= ratio <= 1 and 0 < least <= 1):
        raise InputError(
            f"bits {bits}, ratio {ratio}, least {least}", expected="2 to 8 bits, a ratio from 0 to 1, least above 0 and at most 1"
        )
    m = top_k + int(ratio * (len(router_ED) - top_k))
    logits_nE = x_nD @ router_ED.T
    top_nM = np.argpartition(-logits_nE, m - 1, axis=1)[:, :m]
    found = [clipped(router_ED, bits, float(c)) for c in np.linspace(least, 1, _TRIED)]
    losses = [divergence(logits_nE, x_nD @ made_ED.T, top_nM) for made_ED in found]
    return found[int(np.argmin(losses))]


def clipped(router_ED: np.ndarray, bits: int, share: float) -> np.ndarray:
    """Each row rounded to even levels between `share` of its least and of its largest weight, zero included."""
    low_E1 = share * np.minimum(router_ED.min(1, keepdims=True), 0)
    step_E1 = (share * np.maximum(router_ED.max(1, keepdims=True), 0) - low_E1) / (2**bits - 1)
    step_E1 = np.where(step_E1 == 0, 1, step_E1)
    zero_E1 = np.rint(-low_E1 / step_E1)
    return ((np.clip(np.rint(router_ED / step_E1) + zero_E1, 0, 2**bits - 1) - zero_E1) * step_E1).astype(np.float32)


def divergence(logits_nE: np.ndarray, other_nE: np.ndarray, top_nM: np.ndarray) -> float:
    """Mean KL, in nats, of the second softmax from the first over some experts of each token."""
    one_nM, two_nM = (_log_softmax(np.take_along_axis(x.astype(np.float64), top_nM, 1)) for x in (logits_nE, other_nE))
    return float((np.exp(one_nM) * (one_nM - two_nM)).sum(1).mean())


def _log_softmax(x_nM: np.ndarray) -> np.ndarray:
    x_nM = x_nM - x_nM.max(1, keepdims=True)
    return x_nM - np.log(np.exp(x_nM).sum(1, keepdims=True))
