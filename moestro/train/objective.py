"""What is minimised: the protocol of an objective and of a phase, and how methods of these kinds are made from a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import InputError
from moestro.core.method import card_of, load
from moestro.layers.config import Part
from moestro.layers.decoder import Output
from moestro.train.data.stream import Batch


@dataclass(frozen=True, slots=True)
class Outcome:
    """loss: scalar to differentiate, a mean over the micro-batch. metrics: name -> scalar, for the log. outputs: of every forward pass."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Sequence[Output] = ()


class Objective(Protocol):
    """A method of kind 'objective': called once per micro-batch, it makes as many forward passes as it needs.

    rng: the only source of randomness; it depends on the seed, the step and the micro-batch. An objective that is an `nn.Module` has its
    buffers saved in checkpoints, and its parameters trained and saved.
    """

    def __call__(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> Outcome: ...


@runtime_checkable
class Measured(Protocol):
    """An objective with measures of its own on held-out sequences, in place of the next token's loss.

    measures: their names, 'loss' first. held_out: the sum of each over the batch, and how many they are sums of.
    """

    measures: tuple[str, ...]

    def held_out(self, module: nn.Module, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, int]: ...


@runtime_checkable
class Phase(Protocol):
    """A method of kind 'training schedule': called before each optimiser step, in the order of the configuration.

    It may change the module's weights and buffers in place, freeze parameters, or change the optimiser's state of a parameter; it
    may neither add nor remove parameters. What it does must follow from step, steps and the module alone, or be kept in its buffers if it
    is an `nn.Module` (they are saved): a resumed run calls it again from the checkpoint's step on. Returns values for the log.
    """

    def __call__(self, module: nn.Module, optimiser: torch.optim.Optimizer, step: int, steps: int) -> Mapping[str, float]: ...


def run(module: nn.Module, batch: Batch, step: int, rng: torch.Generator | None = None) -> Output:
    """One forward pass, inside documents where the batch tells them apart. Routers find each token's domain as `ctx.carry["domain_T"]`."""
    domain_T = batch.domain_B.repeat_interleave(batch.tokens_BT.shape[1])
    inside = {} if batch.document_BT is None else {"segment_BT": batch.document_BT, "position_BT": batch.positions()}
    return module(batch.tokens_BT, step=step, rng=rng, given={"domain_T": domain_T}, **inside)


def cross_entropy(logits_BTV: Tensor, batch: Batch, *, smoothing: float = 0.0) -> Tensor:
    """Mean next-token loss in nats, in float32."""
    flat = logits_BTV.flatten(0, 1).float()
    return functional.cross_entropy(flat, batch.targets_BT.flatten(), label_smoothing=smoothing)


def make(part: Part, kind: str) -> Any:
    """The objective or phase that a configuration names. Raises InputError for an unknown name or option."""
    factory = load(part.name, kind)
    known = {option.name for option in card_of(factory).options}
    if unknown := sorted(set(part.options) - known):
        raise InputError(
            f"{part.name} has no option {', '.join(unknown)}",
            expected="one of " + ", ".join(sorted(known)) if known else "no options",
            fix=f"moestro methods --kind {kind!r}",
        )
    return factory(**part.options)
