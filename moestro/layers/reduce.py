"""Sums over the processes of a data-parallel run; the identity in a single process."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor without gradient over all ranks, the same on every rank."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


@torch.no_grad()
def average_over_ranks(*buffers: Tensor) -> None:
    """Replace running statistics, moved by each rank's tokens, by their means over the ranks."""
    if distributed.is_available() and distributed.is_initialized():
        flat = sum_over_ranks(torch.cat([buffer.reshape(-1) for buffer in buffers])) / distributed.get_world_size()
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def counts(experts_TK: Tensor, num_experts: int) -> Tensor:
    """counts_E, float32: how many slots name each expert."""
    return torch.bincount(experts_TK.reshape(-1) + 1, minlength=num_experts + 1)[1:].float()
