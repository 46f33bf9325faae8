"""What a matrix is multiplied with, as the methods that fit weights to data need it: the mean of x x^T, from few or many tokens.

Shapes: n tokens, C inputs of the matrix, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.kernels.ffn import activate

RIDGE = 3.0  # of `ExpertInputs.chained`: what each input's mean square is raised by for as many tokens as inputs, as a share
PART = 2048  # tokens whose hidden numbers are in memory together
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


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """Of one expert's matrices, from a layer's inputs x_TD and the rows own_n that were routed to the expert.

    A rare expert's moment is drawn towards that of the whole layer: its own n tokens weigh n / (n + prior), all of the layer the
    rest. What its last projection would see of the other tokens is computed, for at most `prior` of them, evenly spaced.
    layer_DD: mean of x x^T over the layer's tokens.
    """

    x_TD: np.ndarray
    own_n: np.ndarray
    spec: ExpertSpec
    layer_DD: np.ndarray
    prior: int = PRIOR

    @property
    def borrowed(self) -> float:
        n = len(self.own_n)
        return self.prior / (n + self.prior) if n + self.prior else 1.0

    def first(self) -> Inputs:
        """Of 'gate' and 'up', one and the same."""
        n, borrowed = len(self.own_n), self.borrowed
        own_DD = _moment(self.x_TD[self.own_n]) if n else 0.0
        return Inputs((1 - borrowed) * own_DD + borrowed * self.layer_DD, n, borrowed)

    def last(self, weights: ExpertWeights) -> Inputs:
        """Of 'down'."""
        moment_FF = np.zeros((weights.down_DF.shape[1],) * 2)
        for share, x_nD in self._parts():
            moment_FF += share * _squares(hidden(x_nD, weights, self.spec))
        return Inputs(moment_FF, len(self.own_n), self.borrowed)

    def chained(self, weights: ExpertWeights, encoded: ExpertWeights) -> tuple[Inputs, np.ndarray]:
        """(what `gate` and `up` of the encoded weights give to 'down', down_DF moved to make good what they lost of the plain ones').

        W + W lost (H' + ridge)^-1 with lost = mean of (h - h') h'^T and H' = mean of h' h'^T (arXiv 2504.09629): of all last matrices
        the one whose output of h' is nearest to W h. The ridge is RIDGE F / n of each input's mean square, n tokens, so that few
        tokens move little. Raises InputError for moments that are no moments.
        """
        from scipy.linalg import solve

        down_DF = weights.down_DF
        moment_FF, lost_FD = np.zeros((down_DF.shape[1],) * 2), np.zeros(down_DF.shape[::-1])
        for share, x_nD in self._parts():
            h_nF = hidden(x_nD, encoded, self.spec)
            moment_FF += share * _squares(h_nF)
            lost_nF = hidden(x_nD, weights, self.spec)
            lost_nF -= h_nF
            lost_FD += share * (h_nF.T @ (lost_nF @ down_DF.T))
        spread = sum(share**2 / len(rows) for share, rows in self._samples())
        inputs = Inputs(moment_FF, len(self.own_n), self.borrowed)
        _check(moment_FF)
        if not np.isfinite(lost_FD).all():  # whoever encodes it says what is wrong with down_DF
            return inputs, down_DF
        diagonal_F = np.diag(moment_FF)
        ridged_FF = moment_FF.copy()
        ridged_FF.reshape(-1)[:: len(diagonal_F) + 1] += np.where(
            diagonal_F == 0, diagonal_F.mean() or 1.0, RIDGE * len(diagonal_F) * spread * diagonal_F
        )
        moved_FD = solve(ridged_FF, lost_FD, assume_a="pos", overwrite_a=True)
        return inputs, (down_DF + moved_FD.T).astype(np.float32)

    def _samples(self) -> list[tuple[float, np.ndarray]]:
        """(weight, rows) of the expert's own tokens and of some of all."""
        some_T = np.arange(0, len(self.x_TD), max(1, len(self.x_TD) // max(1, self.prior)))
        found = ((1 - self.borrowed, self.own_n), (self.borrowed, some_T))
        return [(share, rows) for share, rows in found if share and len(rows)]

    def _parts(self) -> Iterator[tuple[float, np.ndarray]]:
        """(weight of a token, inputs) of these, no more than PART together."""
        for share, rows in self._samples():
            for start in range(0, len(rows), PART):
                yield share / len(rows), self.x_TD[rows[start : start + PART]]


def hidden(x_nD: np.ndarray, weights: ExpertWeights, spec: ExpertSpec) -> np.ndarray:
    """What goes into an expert's last projection, float32 [n, F]."""

    def affine(weight_FD: np.ndarray, bias_F: np.ndarray | None) -> np.ndarray:
        y_nF = x_nD.astype(np.float32, copy=False) @ weight_FD.T
        return y_nF if bias_F is None else y_nF + bias_F

    gate_nF = None if weights.gate_FD is None else affine(weights.gate_FD, weights.gate_F)
    return activate(gate_nF, affine(weights.up_FD, weights.up_F), spec.activation, spec.limit, spec.alpha)


def _moment(x_nC: np.ndarray) -> np.ndarray:
    moment_CC = _squares(x_nC).astype(np.float64)
    moment_CC /= max(1, len(x_nC))
    return moment_CC


def _squares(x_nC: np.ndarray) -> np.ndarray:
    """Sum of x x^T, float32."""
    x_nC = x_nC.astype(np.float32, copy=False)
    return x_nC.T @ x_nC


def _check(moment_CC: np.ndarray) -> None:
    if not np.isfinite(moment_CC).all() or (np.diag(moment_CC) < 0).any():
        raise InputError("the second moments of a matrix's inputs are not finite sums of squares", fix="profile again")


def factor(moment_CC: np.ndarray, damp: float) -> np.ndarray:
    """U_CC, float32 and upper, with U^T U the inverse of the damped moment. Inputs that are always 0 stand alone."""
    from scipy.linalg import get_lapack_funcs

    if not damp > 0:
        raise InputError(f"the damping is {damp}", expected="a number above 0", fix="use 0.01")
    _check(moment_CC)
    diagonal_C = np.diag(moment_CC)
    mean = float(diagonal_C.mean()) or 1.0
    damped_CC = moment_CC[::-1, ::-1].copy()  # M upper with M M^T = H is the flipped lower factor of the flipped H
    damped_CC.reshape(-1)[:: len(damped_CC) + 1] += np.where(diagonal_C[::-1] == 0, mean, damp * mean)
    potrf, trtri = get_lapack_funcs(("potrf", "trtri"), (damped_CC,))
    lower_CC, wrong = potrf(damped_CC, lower=1, clean=1, overwrite_a=1)
    if wrong:
        raise InputError("the second moments of a matrix's inputs are not positive", fix="raise --damp, or profile more text")
    upper_CC, _ = trtri(np.ascontiguousarray(lower_CC[::-1, ::-1]), lower=0)  # U = M^-1
    return np.triu(upper_CC).astype(np.float32)
