"""What an expert is: its shape and arithmetic (`ExpertSpec`), its weights, and the protocol of a layer's experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from moestro.core.routing import Array, Routing


class ExpertKey(NamedTuple):
    """One expert of one layer: `layer` is the MoE layer's ordinal 0..L-1 (not the decoder layer), `expert` 0..E-1."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Shape and arithmetic of a feed-forward expert: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    activation: 'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', or 'swiglu_clamped', which is
    (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g) with g = min(gate, limit).
    weigh_input: the routing weight multiplies the expert's input, not its output.
    """

    d_model: int
    d_expert: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    limit: float = 0.0
    alpha: float = 1.0
    weigh_input: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights of one expert."""
        rows = self.d_expert * (2 if self.gated else 1)
        return rows * self.d_model + self.d_model * self.d_expert + (rows + self.d_model if self.bias else 0)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert's weights, output rows first: gate_FD (None without a gate), up_FD, down_DF, and biases or None."""

    gate_FD: Array | None
    up_FD: Array
    down_DF: Array
    gate_F: Array | None = None
    up_F: Array | None = None
    down_D: Array | None = None


@runtime_checkable
class Experts(Protocol):
    """The experts of one layer."""

    @property
    def num(self) -> int: ...

    @property
    def spec(self) -> ExpertSpec: ...

    def weights(self, e: int) -> ExpertWeights: ...

    def run(self, x_TD: Array, routing: Routing) -> Array:
        """y_TD: the weighted sum of the routed experts' outputs; a token with no expert gets zeros."""
        ...

    def output(self, x_TD: Array, e: int) -> Array:
        """y_TD of expert e alone, unweighted."""
        ...
