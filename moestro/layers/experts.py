"""Trainable experts. A bank maps rows sorted by expert to rows; gathering, weighing and summing is done once, here.

Banks are plain modules, so that one bank may stand in several layers or be run several times in one: nothing is copied.
Shapes: T tokens, N pairs, E experts, D model width, F expert width, K slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.routing import EMPTY, Routing
from moestro.layers.dispatch import combine, gather, grouped_linear, order_of, swiglu
from moestro.layers.site import Site, require

FFN = "ffn"  # the kind of an expert that costs matrix products; others name themselves
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


class ExpertBank(nn.Module):
    """The experts of a layer (a core `Experts`). A new kind implements `on_pairs`, `kinds` and `costs`.

    kinds: one word per expert, 'ffn' for those that cost matrix products. costs: multiply-adds per token of each expert.
    """

    kinds: tuple[str, ...]
    costs: tuple[int, ...]
    spec: ExpertSpec

    @property
    def num(self) -> int:
        return len(self.kinds)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        """y_ND: expert e on the rows starts[e]:starts[e+1], unweighted."""
        raise AssertionError(f"{type(self).__name__} has no on_pairs")

    def weights(self, e: int) -> ExpertWeights:
        """Views of expert e's weights, for experts that are a plain feed-forward layer."""
        raise AssertionError(f"expert {e} of {type(self).__name__} is no plain feed-forward layer")

    def run(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """y_TD: the weighted sum of each token's experts; zeros for a token without any."""
        routing = self._without_idle(routing)
        order = order_of(routing.experts_TK, self.num)
        if not order.starts[-1]:  # nobody runs; the weights keep their (zero) gradient path
            return torch.zeros_like(x_TD) + 0.0 * routing.weights_TK.sum().to(x_TD.dtype)
        return combine(self.on_pairs(gather(x_TD, order), order.starts), routing, order)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        return self.run(x_TD, routing)

    def output(self, x_TD: Tensor, e: int) -> Tensor:
        """y_TD of expert e alone, unweighted."""
        starts = [0] * (e + 1) + [x_TD.shape[0]] * (self.num - e)
        return self.on_pairs(x_TD, starts)

    def _without_idle(self, routing: Routing) -> Routing:
        """The routing without experts whose output is zero: their pairs cost nothing."""
        idle = [kind == "zero" for kind in self.kinds]
        if not any(idle):
            return routing
        mask = torch.tensor([*idle, False], device=routing.experts_TK.device)[routing.experts_TK]  # -1 reads the last
        return replace(routing, experts_TK=routing.experts_TK.masked_fill(mask, EMPTY))


class Stacked(ExpertBank):
    """E feed-forward experts of one width: gate_up_EFD [E, 2F, D] (gate rows first; [E, F, D] without a gate), down_EDF [E, D, F].

    zero_output: the output map starts at zero, so that the layer starts as the identity beside its residual.
    """

    def __init__(
        self, num: int, spec: ExpertSpec, *, std: float = 0.02, down_std: float = 0.0, zero_output: bool = False
    ) -> None:
        super().__init__()
        require(num > 0 and spec.d_expert > 0, f"{num} experts of width {spec.d_expert}", "at least one of width 1")
        require(spec.activation in ACTIVATIONS, f"activation {spec.activation!r}", "one of " + ", ".join(ACTIVATIONS))
        rows = spec.d_expert * (2 if spec.gated else 1)
        self.spec = spec
        self.kinds = (FFN,) * num
        self.costs = (rows * spec.d_model + spec.d_expert * spec.d_model,) * num
        self.gate_up_EFD = nn.Parameter(torch.randn(num, rows, spec.d_model) * std)
        self.down_EDF = nn.Parameter(torch.randn(num, spec.d_model, spec.d_expert) * (down_std or std) * (not zero_output))
        if spec.bias:
            self.gate_up_EF = nn.Parameter(torch.zeros(num, rows))
            self.down_ED = nn.Parameter(torch.zeros(num, spec.d_model))

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        h = grouped_linear(x_ND, self.gate_up_EFD, starts)
        if self.spec.bias:
            h = h + per_row(self.gate_up_EF, starts).to(h.dtype)
        y = grouped_linear(activate(h, self.spec), self.down_EDF, starts)
        return y + per_row(self.down_ED, starts).to(y.dtype) if self.spec.bias else y

    def weights(self, e: int) -> ExpertWeights:
        """Views of expert e's weights."""
        f = self.spec.d_expert
        up, gate = (self.gate_up_EFD[e, f:], self.gate_up_EFD[e, :f]) if self.spec.gated else (self.gate_up_EFD[e], None)
        if not self.spec.bias:
            return ExpertWeights(gate, up, self.down_EDF[e])
        bias = self.gate_up_EF[e]
        return ExpertWeights(gate, up, self.down_EDF[e], bias[:f] if gate is not None else None, bias[-f:], self.down_ED[e])


class Joined(ExpertBank):
    """Several banks as one: ids run through the banks in order. The banks are references and may be shared with other layers."""

    def __init__(self, banks: Sequence[ExpertBank]) -> None:
        super().__init__()
        self.banks = nn.ModuleList(banks)
        self.spec = banks[0].spec  # others may differ in width

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(kind for bank in self._each() for kind in bank.kinds)

    @property
    def costs(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(cost for bank in self._each() for cost in bank.costs)

    def weights(self, e: int) -> ExpertWeights:
        bank, inside = self._find(e)
        return bank.weights(inside)

    def on_pairs(self, x_ND: Tensor, starts: list[int]) -> Tensor:
        outputs, first = [], 0
        for bank in self._each():
            part = starts[first : first + bank.num + 1]
            first += bank.num
            if part[-1] > part[0]:
                outputs.append(bank.on_pairs(x_ND[part[0] : part[-1]], [s - part[0] for s in part]))
        return torch.cat(outputs) if outputs else torch.zeros_like(x_ND)

    def _each(self) -> list[ExpertBank]:
        return list(self.banks)  # type: ignore[arg-type]

    def _find(self, e: int) -> tuple[ExpertBank, int]:
        for bank in self._each():
            if e < bank.num:
                return bank, e
            e -= bank.num
        raise IndexError("no such expert")


class Shared(nn.Module):
    """The always-on expert: a feed-forward layer of any width, optionally times sigmoid(x . gate)."""

    def __init__(self, spec: ExpertSpec, *, gate: bool = False, std: float = 0.02, down_std: float = 0.0) -> None:
        super().__init__()
        self.bank = Stacked(1, spec, std=std, down_std=down_std)
        self.gate = nn.Linear(spec.d_model, 1, bias=False) if gate else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.bank.output(x_TD, 0)
        return y_TD if self.gate is None else y_TD * self.gate(x_TD).sigmoid().to(y_TD.dtype)


def activate(h_NF: Tensor, spec: ExpertSpec) -> Tensor:
    """The inner activation of an expert: act(gate) * up of [gate, up], or act(h) without a gate."""
    if not spec.gated:
        return ACTIVATIONS[spec.activation](h_NF)
    if spec.activation == "silu":
        return swiglu(h_NF)
    gate, up = h_NF.chunk(2, -1)
    return ACTIVATIONS[spec.activation](gate) * up


def per_row(values_EX: Tensor, starts: list[int]) -> Tensor:
    """values_NX: each expert's row, repeated for its pairs."""
    counts = torch.tensor([b - a for a, b in pairwise(starts)], device=values_EX.device)
    return values_EX.repeat_interleave(counts, 0)


def spec_at(site: Site, d_expert: int = 0) -> ExpertSpec:
    """The experts' shape and arithmetic that the site's configuration asks for."""
    c = site.config
    width = d_expert or site.d_expert
    return ExpertSpec(site.d_model, width) if c is None else ExpertSpec(site.d_model, width, c.activation, c.gated, c.bias)


def down_std(site: Site) -> float:
    """The initial standard deviation of maps that write into the residual stream: smaller in deep models."""
    return site.init_std / math.sqrt(2 * max(1, site.layers))
