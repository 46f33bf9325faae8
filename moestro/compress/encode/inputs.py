"""What a matrix is multiplied with, as the methods that fit weights to data need it: the mean of x x^T, from few or many tokens.

Shapes: n tokens, C inputs of the matrix, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.kernels.ffn import activate

PRIOR = 256  # tokens of the expert's own that weigh as much as all other tokens of the layer together


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of one matrix. moment_CC: mean of x x^T, float64. tokens: how many were its expert's own, 0 for none.

    borrowed: the share of the moment that comes from tokens which were routed to other experts.
    """

    moment_CC: np.ndarray
    tokens: int
    borrowed: float = 0.0
    _factors: dict[tuple[float, bool], np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, x_nC: np.ndarray) -> Inputs:
        """From the inputs themselves."""
        return cls(_moment(x_nC), len(x_nC))

    @property
    def order(self) -> np.ndarray:
        """The inputs by falling mean square."""
        return np.argsort(-np.diag(self.moment_CC), kind="stable")

    def factor(self, damp: float, *, ordered: bool = False) -> np.ndarray:
        """See `factor`; kept, as matrices that are multiplied with the same inputs ask for it in turn. ordered: of the inputs in `order`."""
        key = damp, ordered
        if key not in self._factors:
            moment_CC = self.moment_CC[np.ix_(self.order, self.order)] if ordered else self.moment_CC
            self._factors[key] = factor(moment_CC, damp)
        return self._factors[key]


def expert_inputs(
    x_TD: np.ndarray, own_n: np.ndarray, weights: ExpertWeights, spec: ExpertSpec, *, layer_DD: np.ndarray, prior: int = PRIOR
) -> Mapping[str, Inputs]:
    """Of an expert's 'gate' and 'up' (one and the same) and 'down', from a layer's inputs and the rows that were routed to it.

    A rare expert's moment is drawn towards that of the whole layer: its own n tokens weigh n / (n + prior), all of the layer the
    rest. What its last projection would see of the other tokens is computed, for at most `prior` of them, evenly spaced.
    layer_DD: mean of x x^T over the layer's tokens.
    """
    n = len(own_n)
    borrowed = prior / (n + prior) if n + prior else 1.0
    some_T = np.arange(0, len(x_TD), max(1, len(x_TD) // max(1, prior)))
    hidden_nF, other_nF = (hidden(x_TD[rows], weights, spec) for rows in (own_n, some_T))
    own_DD = _moment(x_TD[own_n]) if n else 0.0
    inner = Inputs((1 - borrowed) * own_DD + borrowed * layer_DD, n, borrowed)
    own_FF = _moment(hidden_nF) if n else 0.0
    last = Inputs((1 - borrowed) * own_FF + borrowed * _moment(other_nF), n, borrowed)
    return {"gate": inner, "up": inner, "down": last}


def hidden(x_nD: np.ndarray, weights: ExpertWeights, spec: ExpertSpec) -> np.ndarray:
    """What goes into an expert's last projection, float32 [n, F]."""

    def affine(weight_FD: np.ndarray, bias_F: np.ndarray | None) -> np.ndarray:
        y_nF = x_nD.astype(np.float32, copy=False) @ weight_FD.T
        return y_nF if bias_F is None else y_nF + bias_F

    gate_nF = None if weights.gate_FD is None else affine(weights.gate_FD, weights.gate_F)
    return activate(gate_nF, affine(weights.up_FD, weights.up_F), spec.activation, spec.limit, spec.alpha)


def _moment(x_nC: np.ndarray) -> np.ndarray:
    x_nC = x_nC.astype(np.float32, copy=False)
    return (x_nC.T @ x_nC).astype(np.float64) / max(1, len(x_nC))


def factor(moment_CC: np.ndarray, damp: float) -> np.ndarray:
    """U_CC, float32 and upper, with U^T U the inverse of the damped moment. Inputs that are always 0 stand alone."""
    from scipy.linalg import get_lapack_funcs

    if not damp > 0:
        raise InputError(f"the damping is {damp}", expected="a number above 0", fix="use 0.01")
    diagonal_C = np.diag(moment_CC)
    if not np.isfinite(moment_CC).all() or (diagonal_C < 0).any():
        raise InputError("the second moments of a matrix's inputs are not finite sums of squares", fix="profile again")
    mean = float(diagonal_C.mean()) or 1.0
    damped_CC = moment_CC[::-1, ::-1].copy()  # M upper with M M^T = H is the flipped lower factor of the flipped H
    damped_CC.reshape(-1)[:: len(damped_CC) + 1] += np.where(diagonal_C[::-1] == 0, mean, damp * mean)
    potrf, trtri = get_lapack_funcs(("potrf", "trtri"), (damped_CC,))
    lower_CC, wrong = potrf(damped_CC, lower=1, clean=1, overwrite_a=1)
    if wrong:
        raise InputError("the second moments of a matrix's inputs are not positive", fix="raise --damp, or profile more text")
    upper_CC, _ = trtri(np.ascontiguousarray(lower_CC[::-1, ::-1]), lower=0)  # U = M^-1
    return np.triu(upper_CC).astype(np.float32)
