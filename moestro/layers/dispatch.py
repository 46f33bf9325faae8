"""From tokens to pairs sorted by expert and back, and matrix products over the sorted segments. Differentiable, ragged.

One gather, one product per non-empty expert written in place, one weighted sum. Nothing is scattered with index_add, and no
gradient of one expert's weights is ever as large as all experts' weights. First-order gradients only.
Shapes: T tokens, N pairs, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.core.routing import Routing
from moestro.layers.memory import fresh


@dataclass(frozen=True, slots=True)
class Order:
    """The non-empty slots of a routing, sorted by expert, stable in token then slot.

    token_N: each pair's token. flat_N: its place in the routing's flattened slots. starts: E+1 numbers, so that expert e has the
    pairs starts[e]:starts[e+1]. place_N: the sorted place of each pair when pairs are in token order. first_T: where each token
    begins in that order. experts_N: each pair's expert.
    """

    token_N: Tensor
    flat_N: Tensor
    experts_N: Tensor
    starts: list[int]
    place_N: Tensor
    first_T: Tensor


def order_of(experts_TK: Tensor, num_experts: int) -> Order:
    """Sort a routing's pairs. Ids at or above `num_experts` are a programmer's error."""
    k = experts_TK.shape[1]
    flat = experts_TK.reshape(-1)
    # Empty slots sort to the front and are cut off; counting them needs no second pass over the pairs.
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    assert counts.shape[0] == num_experts + 1, "a routing names an expert beyond E"
    totals = counts.tolist()
    empty = totals[0]
    sorted_ids, order = torch.sort(flat, stable=True)
    flat_N, experts_N = order[empty:], sorted_ids[empty:]
    starts = [0]
    for count in totals[1:]:
        starts.append(starts[-1] + count)
    place = torch.empty_like(order)
    place[order] = torch.arange(-empty, flat.numel() - empty, device=flat.device)
    if empty:
        kept = experts_TK >= 0
        place = place[kept.reshape(-1)]
        per_T = kept.sum(1)
        first_T = per_T.cumsum(0) - per_T
    else:
        first_T = torch.arange(0, flat.numel(), max(k, 1), device=flat.device)[: experts_TK.shape[0]]
    token_N = torch.div(flat_N, max(k, 1), rounding_mode="floor")
    return Order(token_N, flat_N, experts_N, starts, place, first_T)


def gather(x_TD: Tensor, order: Order) -> Tensor:
    """x_ND: each pair's token, sorted by expert."""
    return _Gather.apply(x_TD, order.token_N, order.place_N, order.first_T)  # type: ignore[no-any-return]


def combine(y_ND: Tensor, routing: Routing, order: Order) -> Tensor:
    """y_TD: the sum of each token's pairs, weighted by the routing; a token without any gets zeros."""
    weight_N = routing.weights_TK.reshape(-1)[order.flat_N].to(y_ND.dtype)
    return _Combine.apply(y_ND, weight_N, order.token_N, order.place_N, order.first_T)  # type: ignore[no-any-return]


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, starts: list[int]) -> Tensor:
    """y_NO: rows starts[e]:starts[e+1] of x times weight_EOI[e] transposed."""
    return _GroupedLinear.apply(x_NI, weight_EOI.to(x_NI.dtype), starts)  # type: ignore[no-any-return]


def swiglu(h_N2F: Tensor) -> Tensor:
    """silu(gate) * up of h = [gate, up]; its backward writes one array instead of five."""
    return _SwiGLU.apply(h_N2F)  # type: ignore[no-any-return]


def _bag(rows: Tensor, index: Tensor, first_T: Tensor, weight: Tensor | None) -> Tensor:
    if not rows.shape[0]:
        return rows.new_zeros(first_T.shape[0], rows.shape[1])
    return torch.embedding_bag(rows, index, first_T, False, 0, False, weight)[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_N: Tensor, place_N: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_N, first_T)
        return x.index_select(0, token_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        place_N, first_T = ctx.saved_tensors
        return _bag(grad.contiguous(), place_N, first_T, None), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weight_N: Tensor, token_N: Tensor, place_N: Tensor, first_T: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N, token_N)
        return _bag(y_ND.contiguous(), place_N, first_T, weight_N[place_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y_ND, weight_N, token_N = ctx.saved_tensors
        rows = grad.index_select(0, token_N)
        weight = torch.linalg.vecdot(y_ND, rows) if ctx.needs_input_grad[1] else None
        return rows.mul_(weight_N[:, None]), weight, None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, starts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.starts = starts
        out = fresh(x, (x.shape[0], weight.shape[1]))
        for e, (a, b) in enumerate(pairwise(starts)):
            if b > a:
                torch.mm(x[a:b], weight[e].t(), out=out[a:b])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = fresh(x, x.shape) if ctx.needs_input_grad[0] else None
        dw = fresh(weight, weight.shape) if ctx.needs_input_grad[1] else None
        for e, (a, b) in enumerate(pairwise(ctx.starts)):
            if b > a:
                if dx is not None:
                    torch.mm(grad[a:b], weight[e], out=dx[a:b])
                if dw is not None:
                    torch.mm(grad[a:b].t(), x[a:b], out=dw[e])
            elif dw is not None:
                dw[e].zero_()
        return dx, dw, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        gate, up = h.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        gate, up = h.chunk(2, -1)
        out = fresh(h, h.shape)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(grad, torch.nn.functional.silu(gate), out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out
