"""The processes of a data-parallel run, as `torchrun` starts them: sums over them, and equal weights in all. One process is a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from moestro.core.errors import MoestroError
from moestro.layers.reduce import sum_over_ranks


@dataclass(frozen=True, slots=True)
class Group:
    """rank of this process and number of all. The first one writes files and messages."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, bit-equal in each."""
        return sum_over_ranks(values) if self.size > 1 else values

    def any(self, flag: bool) -> bool:
        """Whether a process says so."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes. A parameter without gradient anywhere keeps none."""
        if self.size == 1:
            return
        has = self.sum(torch.tensor([float(p.grad is not None) for p in parameters]))
        shared = [p for p, n in zip(parameters, has.tolist(), strict=True) if n]
        if not shared:
            return
        flat = self.sum(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in shared])) / self.size
        for p, part in zip(shared, flat.split([p.numel() for p in shared]), strict=True):
            p.grad = part.view_as(p)

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def check_equal(self, tensors: Iterable[Tensor], step: int) -> None:
        """Raises MoestroError when the processes' weights or buffers have come apart."""
        if self.size == 1:
            return
        own = torch.stack([t.detach().double().nan_to_num().sum() for t in tensors])
        first = own.clone()
        distributed.broadcast(first, 0)
        if self.any(not torch.equal(own, first)):
            raise MoestroError(
                f"after step {step} the processes have different weights or buffers",
                expected="equal ones: whatever a layer counts must be summed over the processes (moestro.layers.reduce)",
                fix="train in one process, or without the method that keeps local counts",
            )


@contextmanager
def joined() -> Iterator[Group]:
    """The group that torchrun's environment describes (gloo), left at the end; a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    distributed.init_process_group("gloo")
    try:
        yield Group(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
