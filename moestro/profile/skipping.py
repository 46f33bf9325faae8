"""PPL-p% activation sparsity: how many neurons of the routed experts can be skipped before perplexity rises by p percent.

Luo et al. 2024, arXiv 2411.02335: one error level (CETT) for all layers, a threshold per layer that reaches it, found once on the full
model; the level is searched by bisection on the loss of the model that skips. Needs torch and a model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import InputError
from moestro.core.experts import Experts, ExpertSpec, ExpertWeights
from moestro.core.routing import Routing
from moestro.models.experts import gated
from moestro.models.open import Model
from moestro.profile.data import Texts
from moestro.profile.measures.activation_sparsity import thresholds
from moestro.profile.probe import make
from moestro.profile.profile import Profile
from moestro.profile.run import Recording

if TYPE_CHECKING:
    import torch

STEPS = 12


class Skipping:
    """Experts that leave out every neuron whose part of the output, |s_i| |W_down[:, i]|, is below a threshold. Counts what it kept."""

    def __init__(self, inner: Experts, threshold: float) -> None:
        self._inner, self._threshold = inner, threshold
        self.kept = self.neurons = 0

    @property
    def num(self) -> int:
        return self._inner.num

    @property
    def spec(self) -> ExpertSpec:
        return self._inner.spec

    def weights(self, e: int) -> ExpertWeights:
        return self._inner.weights(e)

    def output(self, x_TD: torch.Tensor, e: int) -> torch.Tensor:
        import torch.nn.functional as F

        w = self.weights(e)
        gate_TF = None if w.gate_FD is None else F.linear(x_TD, w.gate_FD, w.gate_F)
        hidden_TF = gated(gate_TF, F.linear(x_TD, w.up_FD, w.up_F), self.spec)
        keep_TF = hidden_TF.float().abs() * w.down_DF.float().norm(dim=0) >= self._threshold
        self.kept += int(keep_TF.sum())
        self.neurons += keep_TF.numel()
        return F.linear(hidden_TF * keep_TF, w.down_DF, w.down_D)

    def run(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        import torch

        pairs, y_TD = routing.pairs(self.num), torch.zeros_like(x_TD)
        for e in torch.nonzero(pairs.starts_E1.diff()).reshape(-1).tolist():
            rows = slice(int(pairs.starts_E1[e]), int(pairs.starts_E1[e + 1]))
            token_n, scale_n1 = pairs.token_N[rows], pairs.weight_N[rows, None].to(x_TD.dtype)
            if self.spec.weigh_input:
                y_TD.index_add_(0, token_n, self.output(x_TD[token_n] * scale_n1, e))
            else:
                y_TD.index_add_(0, token_n, self.output(x_TD[token_n], e) * scale_n1)
        return y_TD


def ppl_sparsity(
    model: Model,
    texts: Texts,
    profile: Profile,
    percent: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """What `activation_sparsity` shows as PPL-p%: {'percent', 'kappa', 'ratio' of neurons kept, 'rise' of perplexity in percent}.

    texts: may be other text than the profile's, which the thresholds come from. The model is as before afterwards.

    Raises:
        InputError: percent is not above 0, or nothing can be predicted. ProfileError: the profile was made without `sparsity`.
    """
    if percent <= 0:
        raise InputError(f"perplexity may rise by {percent} %", expected="more than 0")
    dense = _loss(model, texts)

    def skipping(kappa: float) -> tuple[float, float]:
        """(loss, ratio of neurons kept) at an error level."""
        inner = [layer.experts for layer in model.layers]
        wrapped = [Skipping(experts, float(t)) for experts, t in zip(inner, thresholds(profile, kappa))]
        try:
            for layer, experts in zip(model.layers, wrapped):
                layer.replace(experts=experts)
            loss = _loss(model, texts)
        finally:
            for layer, experts in zip(model.layers, inner):
                layer.replace(experts=experts)
        return loss, float(np.mean([w.kept / max(1, w.neurons) for w in wrapped]))

    found = search(lambda kappa: skipping(kappa)[0] - dense, math.log1p(percent / 100), progress)
    loss, ratio = skipping(found)
    return {"percent": percent, "kappa": found, "ratio": ratio, "rise": 100 * math.expm1(loss - dense)}


def search(rise: Callable[[float], float], most: float, progress: Callable[[int, int], None] = lambda done, total: None) -> float:
    """The largest kappa in [0, 1] with rise(kappa) <= most, by bisection to 2**-12; 0 when there is none."""
    low, high = 0.0, 1.0
    if rise(high) <= most:
        return high
    for step in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) <= most else (low, middle)
        progress(step + 1, STEPS)
    return low


def _loss(model: Model, texts: Texts) -> float:
    recording = Recording(model, texts, make({"loss": {}}), trace_tokens=0)
    recording.run(model)
    made = recording.profile()
    if not made.arrays["predicted_G"].sum():
        raise InputError("no token of the text is predicted", expected="sequences of two tokens or more")
    return float(made.arrays["nats_G"].sum() / made.arrays["predicted_G"].sum())
