"""Second moments: what quantisation, projection and merging need to know of an expert's inputs.

Paper      none; used by Wanda-like pruning (arXiv 2410.12013), GPTQ-like quantisation and least-squares merging
Idea       The error of a changed weight is weighed by the second moment of what is multiplied with it.
Rule       input_moment[l, e, d] = sum over its tokens of x_d^2, gated_moment with (g x_d)^2; hidden_moment, gated_hidden of the last
           projection's input likewise; with `full` also input_covariance[l, e] = sum of x x^T
Needs      inputs and experts
Gives      input_moment_LED, gated_moment_LED, hidden_moment_LEF, gated_hidden_LEF (and input_covariance_LEDD)
Departs    nothing; sums, not means: divide by the expert's tokens
Checked    diagonal of the full moment equal to the diagonal form; numpy on the layer's inputs
"""

from __future__ import annotations

from moestro.core.method import method
from moestro.profile.probe import Setting, Statistics
from moestro.profile.seen import Seen, SeenLayer
from moestro.profile.statistics import Sum


@method("profile.probes.moments", kind="probe", fidelity="exact", needs=("inputs", "experts"))
class Moments:
    """Sums of squares per input and per neuron. full: whole matrices, which take 16 L E D^2 bytes."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        names = ("input_moment_LED", "gated_moment_LED", "hidden_moment_LEF", "gated_hidden_LEF")
        self.gives = (*names, "input_covariance_LEDD") if full else names

    def start(self, setting: Setting) -> Statistics:
        la, e, d, f = setting.layers, setting.width, setting.d_model, setting.d_expert
        shapes = {"D": (la, e, d), "F": (la, e, f), "DD": (la, e, d, d)}
        return {name: Sum(*shapes[name.rsplit("_LE", 1)[1]]) for name in self.gives}

    def update(self, statistics: Statistics, seen: Seen, layer: SeenLayer) -> None:
        for work in layer.work():
            at = (layer.ordinal, work.expert)
            x_nD, hidden_nF = layer.x_TD[work.tokens_n].astype("f8"), work.hidden_nF.astype("f8")
            squared_n1 = work.weights_n[:, None] ** 2
            inner = (*at, slice(hidden_nF.shape[1]))
            statistics["input_moment_LED"].add(at, (x_nD**2).sum(0))
            statistics["gated_moment_LED"].add(at, (x_nD**2 * squared_n1).sum(0))
            statistics["hidden_moment_LEF"].add(inner, (hidden_nF**2).sum(0))
            gate_n1 = 1.0 if layer.facts.spec.weigh_input else squared_n1  # there the hidden values hold the weight already
            statistics["gated_hidden_LEF"].add(inner, (hidden_nF**2 * gate_n1).sum(0))
            if self.full:
                statistics["input_covariance_LEDD"].add(at, x_nD.T @ x_nD)
