"""Which task each token belongs to, for models that serve several."""

from __future__ import annotations

import torch
from torch import Tensor

from moestro.core.errors import InputError
from moestro.core.routing import RouteContext


def task_of(ctx: RouteContext, tokens: int, tasks: int) -> Tensor:
    """task_T from ctx.carry["domain_T"], 0 without it. Raises InputError for a task that the model does not have."""
    task_T = ctx.carry.get("domain_T")
    if task_T is None:
        return torch.zeros(tokens, dtype=torch.int64)
    if len(task_T) and int(task_T.max()) >= tasks:
        raise InputError(
            f"task {int(task_T.max())} of a model for {tasks}",
            expected=f"0 to {tasks - 1}",
            fix="the method's option tasks or groups",
        )
    return task_T
