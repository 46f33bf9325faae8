"""Low-rank patches: distillation into a small correction of attention, shared experts and, if asked for, experts.

Paper      Hu et al. 2021, LoRA, arXiv 2106.09685
Idea       What compression took away is small; a correction of low rank can give much of it back without touching every weight.
Rule       W' = W + (alpha / r) B A, B = 0 at first; routers and norms are trained beside it; loss as in router_norms
Needs      teacher
Gives      the model with W' in the place of W, in the same form as before
Departs    from LoRA: the patches are folded into the weights at the end; of experts stacked in one tensor each gets its own A and B
Checked    nothing changes before the first step; the difference has rank r at most; nearer to the original than router_norms alone
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moestro.core.errors import InputError
from moestro.core.method import method
from moestro.train.data.stream import Batch
from moestro.train.objective import Outcome
from moestro.train.pretrained import Pretrained, opened
from moestro.train.tuned import Left, Tuning
from moestro.train.tuning.router_norms import Distil


class Patch(nn.Module):
    """W + scale B A, of a matrix [R, C] or of several [E, R, C]."""

    def __init__(self, like: Tensor, rank: int, scale: float, rng: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = like.shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(*stack, rank, columns, generator=rng) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(*stack, rows, rank))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.scale * (self.b @ self.a).to(w.dtype)


class Cached:
    """The objective, each patched matrix being computed once per pass."""

    def __init__(self, inner: Distil) -> None:
        self.inner = inner

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome:
        with parametrize.cached():
            return self.inner(module, batch, step, rng)


@method("train.tuning.low_rank", kind="tuning", needs=("teacher",), fidelity="adapted", paper="2106.09685")
def low_rank(
    student: Pretrained,
    teacher: Pretrained,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    experts: bool = False,
    mix: float = 0.9,
    temperature: float = 1.0,
) -> Tuning:
    """experts: patch them too. Raises InputError."""
    if rank < 1:
        raise InputError(f"rank {rank}", expected="1 or more")
    rng = torch.Generator().manual_seed(0)
    places = student.matrices()
    if experts:
        for layer in student.model.layers:
            module = layer._seam.experts
            places += [(module, name) for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
    for module, name in places:
        parametrize.register_parametrization(module, name, Patch(getattr(module, name), rank, alpha / rank, rng))
        module.parametrizations[name].original.requires_grad_(False)  # type: ignore[index,union-attr]
    opened(student.norms_and_routers())

    def fold() -> Left:
        for module, name in places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        return Left()

    return Tuning(Cached(Distil(teacher, mix, temperature)), finish=fold, rate=1e-3)
