"""All experts of one layer in memory: views of a transformers experts module, in the plain form `ExpertWeights`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moestro.core.errors import UnsupportedModel
from moestro.core.experts import ExpertSpec, ExpertWeights
from moestro.core.routing import Routing
from moestro.kernels.ffn import Matrix
from moestro.layers.taps.compressed_experts import Scales
from moestro.models.checkpoint import Checkpoint, check_finite
from moestro.models.layout import Layout, Part
from moestro.models.live import Seam

if TYPE_CHECKING:
    import torch


class Stacked:
    """The experts of one layer as transformers holds them, stacked in 3-D parameters. Differentiable."""

    def __init__(self, seam: Seam) -> None:
        self._module = seam.experts
        self._spec = seam.facts.spec
        self._num = seam.facts.num_experts
        self._transposed, self._interleaved = orientation(seam.experts)

    @property
    def num(self) -> int:
        return self._num

    @property
    def spec(self) -> ExpertSpec:
        return self._spec

    def weights(self, e: int) -> ExpertWeights:
        """Views of expert e's parameters, output rows first; writing to them changes the model."""
        module, spec = self._module, self._spec
        first = module.gate_up_proj if spec.gated else module.up_proj
        rows, down_DF = first[e], module.down_proj[e]
        if self._transposed:
            rows, down_DF = rows.t(), down_DF.t()
        bias = (module.gate_up_proj_bias if spec.gated else module.up_proj_bias)[e] if spec.bias else None
        down_D = module.down_proj_bias[e] if spec.bias else None
        if not spec.gated:
            return ExpertWeights(None, rows, down_DF, None, bias, down_D)
        gate, up = self._halves()
        return ExpertWeights(
            rows[gate], rows[up], down_DF, None if bias is None else bias[gate], None if bias is None else bias[up], down_D
        )

    def _halves(self) -> tuple[slice, slice]:
        """The rows of gate and of up."""
        if self._interleaved:
            return slice(0, None, 2), slice(1, None, 2)
        return slice(0, self._spec.d_expert), slice(self._spec.d_expert, None)

    def output(self, x_TD: torch.Tensor, e: int) -> torch.Tensor:
        return feed_forward(x_TD, self.weights(e), self._spec)

    def run(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        return run_experts(x_TD, routing, self.weights, self._spec, self._num)

    def fill(self, checkpoint: Checkpoint, layout: Layout, ordinal: int) -> None:
        """Give the module real parameters and read every expert into them. Raises CheckpointError when one holds a NaN."""
        import torch

        from moestro.core.experts import ExpertKey

        for name, made in dict(self._module.named_parameters(recurse=False)).items():
            self._module._parameters[name] = torch.nn.Parameter(torch.empty(made.shape, dtype=made.dtype))
        with torch.no_grad():
            for e in range(self._num):
                into, found = self.weights(e), read_expert(checkpoint, layout, ExpertKey(ordinal, e))
                for field in ("gate_FD", "up_FD", "down_DF", "gate_F", "up_F", "down_D"):
                    target, value = getattr(into, field), getattr(found, field)
                    if (target is None) != (value is None):
                        raise UnsupportedModel(f"expert {e} of MoE layer {ordinal} and its class disagree on {field}")
                    if target is not None:
                        target.copy_(torch.from_numpy(value))


def orientation(experts: Any) -> tuple[bool, bool]:
    """Whether an experts module holds its matrices as [in, out], and whether gate and up alternate.

    Llama 4 is the one class without flags; it is transposed and has gate before up.
    """
    return bool(getattr(experts, "is_transposed", True)), not getattr(experts, "is_concatenated", True)


def read_expert(checkpoint: Checkpoint, layout: Layout, key: Any) -> ExpertWeights:
    """One expert as float32 numpy arrays, output rows first. Raises CheckpointError when it holds a NaN or an infinity."""
    from moestro.models.codecs.source import decode, load

    parts = layout.parts(key)
    weights = decode(parts, load(checkpoint, parts))
    check_weights(weights, key)
    return weights


def check_weights(weights: ExpertWeights, key: Any) -> None:
    """Raises CheckpointError when an expert's numpy arrays hold a NaN or an infinity. uint16 is taken as BF16."""
    for field in ("gate_FD", "up_FD", "down_DF", "gate_F", "up_F", "down_D"):
        if (array := getattr(weights, field)) is not None:
            check_finite(array, f"{field} of expert {key.expert} in MoE layer {key.layer}")


def stored_weights(parts: Sequence[Part], raws: Sequence[np.ndarray]) -> ExpertWeights:
    """One expert, its matrices as they are stored (float32, float16 or bf16 bit patterns, views of `raws` where they are not stored
    transposed), its biases in float32. Raises CheckpointError."""
    from moestro.models.codecs.source import view

    found = view(parts, raws)
    matrices = {"gate_FD": found.gate, "up_FD": found.up, "down_DF": found.down}
    arrays = {name: m.data for name, m in matrices.items() if isinstance(m, Matrix)}
    return ExpertWeights(
        arrays.get("gate_FD"), arrays["up_FD"], arrays["down_DF"], found.gate_bias, found.up_bias, found.down_bias
    )


def run_experts(
    x_TD: torch.Tensor, routing: Routing, weights: Any, spec: ExpertSpec, num: int, scales: Scales | None = None
) -> torch.Tensor:
    """y_TD: the routed experts' outputs, weighted and summed; `weights(e)` gives an expert's. A token without experts gets 0.

    scales: what multiplies each token's inputs and neurons.
    """
    import torch

    pairs = routing.pairs(num)
    scale_N1 = pairs.weight_N[:, None].to(x_TD.dtype)
    rows_ND = x_TD[pairs.token_N]
    if spec.weigh_input:
        rows_ND = rows_ND * scale_N1
    starts = pairs.starts_E1.tolist()
    rows = (
        [None] * len(starts)
        if scales is None
        else [Scales(*(s[pairs.token_N[a:b]] for s in scales)) for a, b in itertools.pairwise(starts)]
    )
    out = [feed_forward(rows_ND[a:b], weights(e), spec, rows[e]) for e, (a, b) in enumerate(itertools.pairwise(starts)) if b > a]
    y_TD = torch.zeros_like(x_TD)
    if not out:
        return y_TD
    out_ND = torch.cat(out)
    return y_TD.index_add(0, pairs.token_N, out_ND if spec.weigh_input else out_ND * scale_N1)


def feed_forward(x_TD: torch.Tensor, w: ExpertWeights, spec: ExpertSpec, scales: Scales | None = None) -> torch.Tensor:
    """y_TD of one expert, unweighted; the arithmetic that `ExpertSpec` defines. scales: of these tokens."""
    import torch.nn.functional as F

    if scales is not None:
        first_TD, up_TD = (x_TD * s.to(x_TD.dtype) for s in (scales.gate_TD, scales.up_TD))
        gate_TF = F.linear(first_TD, w.gate_FD, w.gate_F) if w.gate_FD is not None else None
        hidden_TF = gated(gate_TF, F.linear(first_TD if gate_TF is None else up_TD, w.up_FD, w.up_F), spec)
        return F.linear(hidden_TF * scales.hidden_TF.to(x_TD.dtype), w.down_DF, w.down_D)
    gate_TF = F.linear(x_TD, w.gate_FD, w.gate_F) if w.gate_FD is not None else None
    return F.linear(gated(gate_TF, F.linear(x_TD, w.up_FD, w.up_F), spec), w.down_DF, w.down_D)


def gated(gate_TF: torch.Tensor | None, up_TF: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    """What goes into an expert's last projection: act(gate) * up, or act(up) without a gate."""
    if gate_TF is None:
        return activate(up_TF, spec)
    if spec.activation == "swiglu_clamped":
        gate_TF, up_TF = gate_TF.clamp(max=spec.limit), up_TF.clamp(-spec.limit, spec.limit) + 1
    return activate(gate_TF, spec) * up_TF


def activate(x: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    """The activation of `spec`, elementwise."""
    import torch
    import torch.nn.functional as F

    match spec.activation:
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "swiglu_clamped":
            return x * torch.sigmoid(spec.alpha * x)
    raise UnsupportedModel(f"unknown activation {spec.activation!r}")
