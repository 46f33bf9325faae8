"""The training loop: optimiser steps over a stream, with checkpoints, held-out evaluation and a log.

A step depends on the weights, the optimiser's state and the step's number, on nothing else: a run that was killed and resumed
writes the same losses, bit for bit, with the same number of threads and processes on the same machine and libraries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moestro.core.errors import CheckpointError, MoestroError
from moestro.train import checkpoint
from moestro.train.config import TrainConfig
from moestro.train.data.stream import Batch, Stream, drawn
from moestro.train.log import Log
from moestro.train.measure import Meter
from moestro.train.objective import Measured, Objective, Phase, run
from moestro.train.parallel import Group
from moestro.train.rate import factor

Report = Callable[[dict[str, Any]], None]
_DRAW = 1 << 20  # places of random draws in one step; more than a step has micro-batches


class Loop:
    """A run: a model, its optimiser and where they are.

    Args:
        module: answers `module(tokens_BT, step=, rng=, given=)` with `layers.decoder.Output` and has `controllers()`.
        stream: the text; its group must be the micro-batch where config.data.pure is set.
        folder: where log and checkpoints go.
        objective, phases: see `train.objective`; those that are modules are saved with the model.
        report: called with every entry of the log, in the first process only.

    Raises InputError when the batch does not divide among the processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        module: nn.Module,
        stream: Stream,
        folder: Path,
        *,
        objective: Objective,
        phases: Sequence[Phase] = (),
        group: Group | None = None,
        report: Report | None = None,
    ) -> None:
        self.config, self.module, self.stream, self.folder = config, module, stream, folder
        self.objective, self.phases, self.group, self.report = objective, phases, group or Group(), report
        self.micro_batch, self.passes = config.micro(self.group.size)
        parts = {"model": module, "objective": objective} | {f"phase-{i}": phase for i, phase in enumerate(phases)}
        self.modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        self.parameters = list({id(p): p for part in self.modules.values() for p in part.parameters()}.values())
        self.optimiser = _optimiser(config, self.parameters)
        self.meter = Meter(module)
        self.step = 0
        self.evaluation: dict[str, Any] = {}
        self.moved: list[str] = []  # what is not as it was when the checkpoint was written
        self._kept = -1  # entries of the log up to this step stay
        self.group.copy_first(checkpoint.tensors_of(self.modules).values())

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch * self.stream.length

    def resume(self) -> bool:
        """Continue after the newest checkpoint of the folder, if there is one. Raises CheckpointError when it is another run's."""
        saved = checkpoint.latest(self.folder)
        if saved is None:
            return False
        if saved.state["data"] != self.stream.tokens.digest:
            raise CheckpointError(
                f"{saved.folder} was trained on other text than {self.stream.tokens.folder} holds", expected="the same tokens"
            )
        if saved.state["seed"] != self.config.seed:
            raise CheckpointError(f"{saved.folder} has the seed {saved.state['seed']}", expected=f"{self.config.seed}")
        checkpoint.load(saved, self.modules, self.optimiser)
        self.step, self.evaluation = saved.step, saved.state["evaluation"]
        self._kept = saved.step
        now = self._machine()
        self.moved = [f"{name} {saved.state[name]} then, {now[name]} now" for name in now if saved.state[name] != now[name]]
        return True

    def run(self, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Train to the last step, or until `stop` says so after a step; either way the folder then has a checkpoint of the last step.

        Returns what the last log entry and the last evaluation say, and rates. Raises MoestroError when the loss is not finite.
        """
        config, began, first = self.config, time.perf_counter(), self.step
        log = Log(self.folder, self._kept) if self.group.first else None
        entry: dict[str, Any] = {}
        stopped = False
        try:
            with _repeatable():
                if self.step == 0 and not self.evaluation:
                    self._evaluated(log)
                while self.step < config.steps and not stopped:
                    entry = self._timed_step()
                    self._record(log, entry)
                    last = self.step == config.steps
                    if last or (config.evaluate_every and self.step % config.evaluate_every == 0):
                        self._evaluated(log)
                    stopped = self.group.any(stop())
                    if last or stopped or (config.save_every and self.step % config.save_every == 0):
                        self.save(log)
        finally:
            if log is not None:
                log.close()
        seconds, steps = time.perf_counter() - began, self.step - first
        rate = steps * self.tokens_per_step / seconds if seconds else 0.0
        done = {"steps": self.step, "of": config.steps, "stopped": stopped and self.step < config.steps}
        return {
            **done,
            "tokens": self.step * self.tokens_per_step,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(rate, 1),
            "last": {k: v for k, v in entry.items() if k not in ("step", "seconds", "tokens_per_second")},
            "evaluation": self.evaluation,
        }

    def save(self, log: Log | None = None) -> None:
        """Write a checkpoint of where the run is. Raises StorageError."""
        self.group.check_equal(checkpoint.tensors_of(self.modules).values(), self.step)
        if self.group.first:
            if log is not None:
                log.sync()
            state = {
                "seed": self.config.seed,
                "data": self.stream.tokens.digest,
                "tokens": self.step * self.tokens_per_step,
                "evaluation": self.evaluation,
                **self._machine(),
            }
            checkpoint.save(self.folder, self.step, self.modules, self.optimiser, state, self.config.keep)
        self.group.wait()

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its entry for the log. Raises MoestroError when loss or gradient is not finite."""
        config, step = self.config, self.step
        self.module.train()
        rate = config.optimiser.rate * factor(config.rate, step, config.steps)
        for part in self.optimiser.param_groups:
            part["lr"] = rate
        said: dict[str, float] = {}
        for phase in self.phases:
            said |= phase(self.module, self.optimiser, step, config.steps)
        self.optimiser.zero_grad(set_to_none=True)
        self.meter.clear()
        sums: dict[str, Tensor] = {}
        kept = []
        with self.meter.watching():
            for i in range(self.passes):
                number = self.group.rank * self.passes + i
                first = step * config.batch + number * self.micro_batch
                batch = self.stream.batch(first, self.micro_batch)
                # Both torch's own generator (dropout) and the one that is handed on start anew: nothing random outlives a pass.
                torch.manual_seed(drawn(config.seed, 1, step * _DRAW + number))
                rng = torch.Generator().manual_seed(drawn(config.seed, 2, step * _DRAW + number))
                with self._autocast():
                    outcome = self.objective(self.module, batch, step, rng)
                if outcome.loss.requires_grad:
                    (outcome.loss / self.passes).backward()
                for name, value in {"loss": outcome.loss, **outcome.metrics}.items():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double()
                for output in outcome.outputs:
                    self.meter.add(output.routings)
                    kept.append(output.light())
        metrics = self._means(sums)
        self.group.mean_gradients(self.parameters)
        norm = self._clip()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(norm):
            raise MoestroError(
                f"step {step + 1}: loss {metrics['loss']:g}, norm of the gradient {norm:g}",
                expected="finite numbers",
                fix="a smaller optimiser.rate or a longer rate.warmup; the last checkpoint is from before",
            )
        self.optimiser.step()
        for controller in self.module.controllers():  # type: ignore[operator,union-attr]
            controller.after_step(kept, step)
        self.step += 1
        return {"step": self.step, **metrics, "norm": norm, "rate": rate, **self.meter.figures(self.group), **said}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out loss in nats per token and bits per byte, of each domain and of all their tokens; {} when nothing is held out.

        An objective with measures of its own gives those instead, without bits per byte.
        """
        places = self.stream.held_out_places(self.config.evaluate_sequences)
        size = self.micro_batch
        batches = [rows[i : i + size] for rows in places for i in range(0, len(rows), size)]
        if not batches:
            return {}
        self.module.eval()
        names = self.objective.measures if isinstance(self.objective, Measured) else ("loss",)
        sums = torch.zeros(len(places), len(names) + 1, dtype=torch.float64)
        processes = self.group.size
        for j in range(self.group.rank, -(-len(batches) // processes) * processes, processes):
            # Every process makes as many passes: a layer may sum over them. What is beyond the end counts nothing.
            batch = self.stream.gather(batches[min(j, len(batches) - 1)])
            rng = torch.Generator().manual_seed(drawn(self.config.seed, 3, j))
            with self._autocast():
                found, number = self._held_out(batch, rng)
            if j < len(batches):
                sums[int(batch.domain_B[0])] += torch.cat((found.double(), torch.tensor([number], dtype=torch.float64)))
        sums = self.group.sum(sums)
        domains, bits, share = {}, 0.0, 0.0
        for domain, (loss, *_, count) in zip(self.stream.tokens.domains, sums.tolist(), strict=True):
            if count:
                domains[domain.name] = loss / count
                bits += loss / math.log(2)
                share += count * domain.bytes / domain.tokens
        whole = dict(zip(names, (sums[:, :-1].sum(0) / sums[:, -1].sum()).tolist(), strict=True))
        if not isinstance(self.objective, Measured):
            whole["bits_per_byte"] = bits / share
        return {**whole, "domains": domains}

    def _held_out(self, batch: Batch, rng: torch.Generator) -> tuple[Tensor, int]:
        if isinstance(self.objective, Measured):
            return self.objective.held_out(self.module, batch, self.step, rng)
        logits = run(self.module, batch, self.step, rng).logits_BTV
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets_BT.flatten(), reduction="sum")
        return loss[None], batch.targets_BT.numel()

    def _machine(self) -> dict[str, Any]:
        """What must stay for the losses to stay equal in their last bits."""
        return {"processes": self.group.size, "threads": torch.get_num_threads(), "torch": torch.__version__}

    def _timed_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        entry = self.train_step()
        seconds = time.perf_counter() - began
        return {**entry, "seconds": round(seconds, 4), "tokens_per_second": round(self.tokens_per_step / seconds, 1)}

    def _evaluated(self, log: Log | None) -> None:
        if found := self.evaluate():
            self.evaluation = found
            self._record(log, {"step": self.step, "evaluation": found})

    def _record(self, log: Log | None, entry: dict[str, Any]) -> None:
        if log is not None:
            log.write(entry)
        if self.report is not None and self.group.first:
            self.report(entry)

    def _means(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        flat = self.group.sum(torch.stack(list(sums.values()))) / (self.passes * self.group.size)
        return dict(zip(sums, flat.tolist(), strict=True))

    def _clip(self) -> float:
        most = self.config.optimiser.clip or math.inf
        grads = [p for p in self.parameters if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(grads, most))

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16")


def _optimiser(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with decay on matrices and none on norms and biases."""
    c = config.optimiser
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": c.decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    first, second = c.betas
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=c.rate, betas=(first, second), eps=c.eps, fused=True)


@contextmanager
def _repeatable() -> Iterator[None]:
    """Deterministic kernels (torch's sums over repeated indices depend on the timing of threads otherwise), torch's settings restored after."""
    before, fills = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
