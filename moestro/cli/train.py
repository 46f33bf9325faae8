"""`moestro train`: train an MoE language model from a configuration or a recipe, and keep it as a checkpoint that loads anywhere."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Json, Quiet, Threads
from moestro.cli.errors import INTERRUPTED, bad_argument
from moestro.cli.output import emit, say

if TYPE_CHECKING:
    from moestro.train.config import TrainConfig
    from moestro.train.loop import Loop

EPILOG = """Examples:

\b
  moestro train tiny -o ./run                            a recipe: learns in under a minute, on text that Python carries
  moestro train tiny --data ./texts -o ./run --steps 500   each folder inside ./texts is a domain
  moestro train config.json --data law=./law.jsonl --data installed:code -o ./run
  moestro train mixed -o ./run --set optimiser.rate=0.002 --set model.router=switch
  moestro train --resume ./run                           after Ctrl-C, a kill or a crash: the same losses, bit for bit
  moestro train tiny -o ./run --export mixtral           then: moestro run ./run/mixtral --raw "The "
  torchrun --nproc-per-node 2 -m moestro train mixed -o ./run
  moestro train router_norms --model ./smaller --against ./model --data book.txt -o ./better   recover what compression cost
  moestro train tsep:keep=4 --model ./model --data task.txt -o ./small    fine-tune for a task, and drop what it does not use
  moestro train otp:price=0.02 --model ./model --data book.txt -o ./skipping    learn which experts need not run

With --model CONFIG is a method of `moestro methods --kind tuning`, and the result a model folder of the same family; experts that are
stored in few bits cannot be trained. --data is [DOMAIN=]WHERE: a text, JSON-lines or Parquet file, a folder, a pattern with *, installed[:DOMAIN] (what this
Python carries), samples:NAME (small labelled data of packages: digits, characters, locales), or hub:org/name[@revision][:PATTERN]. The run's folder gets model/ (weights, configuration, tokenizer),
log.jsonl (every step), train.json, checkpoints/ and tokens/. Ctrl-C ends after the current step with a checkpoint."""


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]",
            help="A JSON file, or a recipe: tiny, mixed, digits, dit, hecto, home, hyperformer, languages, modality, moiie, openmoe, "
            "promoe, task_level, tasks, union, unipool. With --model a method[:option=value,...] of kind tuning.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Train this model instead of a new one.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --model: the original, for methods that learn from it.", show_default=False),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="[DOMAIN=]WHERE", help="Text; may be given several times.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", "-o", metavar="FOLDER", help="The run's folder.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default=False)] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any setting of the configuration, such as batch=32.", show_default=False
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Continue the run in this folder.", show_default=False)
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAMILY",
            help="Also write the result as this Hugging Face family (mixtral, olmoe, ...; auto: the first that fits).",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Train a model with the routers, losses and architectures of `moestro methods`."""
    if (resume is None) == (output is None):
        bad_argument(
            "neither --output nor --resume" if resume is None else "both --output and --resume",
            "--output FOLDER for a new run, --resume FOLDER for one that was stopped",
        )
    if model is None and against is not None:
        bad_argument("there is an --against and no --model", "the model to train with --model")
    if model is not None:
        if config is None or output is None or export:
            bad_argument(
                "--model needs a method and --output, and has no --export", "moestro train METHOD --model MODEL -o FOLDER"
            )
        from moestro.cli.tune import tune

        return tune(config, model, against, data, output, steps, settings or [], threads, quiet, as_json)
    if resume is None and config is None:
        bad_argument("no configuration", "a JSON file or a recipe", "moestro train tiny -o ./run")
    import torch

    from moestro.train.config import changed, read_config
    from moestro.train.parallel import joined
    from moestro.train.session import check_export, keep, locked, reopen, start

    if threads is not None:
        torch.set_num_threads(threads)
    given: dict[str, Any] = {"data__sources": data, "steps": steps}

    def change(saved: dict[str, Any]) -> TrainConfig:
        return changed(saved, settings or (), **given) if config is None else read_config(config, settings or (), **given)

    folder = resume or output
    assert folder is not None
    with joined() as group, locked(folder, group, new=resume is None), stopping() as stop:
        report = Progress(quiet or not group.first)
        loop = start(change({}), folder, group, report) if resume is None else reopen(folder, group, report, change)
        check_export(loop, export or ())
        report.begin(loop)
        summary = loop.run(stop)
        if summary["stopped"]:
            if group.first:
                say(f"stopped after step {summary['steps']} of {summary['of']}; to go on: moestro train --resume {folder}")
            return INTERRUPTED
        if not group.first:
            return 0
        result = {"output": str(folder), **keep(loop, export or ()), **summary}
    if as_json:
        emit(result)
    else:
        print(told(result))
    return 0


def told(result: dict[str, Any]) -> str:
    """The account for people."""
    lines = [f"{result['steps']} steps, {result['tokens']:,} tokens at {result['tokens_per_second']:,.0f}/s: {result['model']}"]
    if found := result["evaluation"]:
        lines.append(f"held out: {_measures(found)}")
        lines.append("  " + "  ".join(f"{name} {loss:.3f}" for name, loss in found["domains"].items()))
    return "\n".join([*lines, *(f"{family}: {folder}" for family, folder in result["exported"].items())])


def _measures(found: dict[str, Any]) -> str:
    """What an evaluation found, in words."""
    if "bits_per_byte" in found:
        return f"loss {found['loss']:.4f} nats per token, {found['bits_per_byte']:.4f} bits per byte"
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "domains")


class Progress:
    """Lines on stderr: every `log_every` steps, and each evaluation."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.every, self.steps = quiet, 1, 0

    def begin(self, loop: Loop) -> None:
        self.every, self.steps = loop.config.log_every, loop.config.steps
        if not self.quiet:
            names = ", ".join(f"{d.name} {d.tokens:,}" for d in loop.stream.tokens.domains)
            total = sum(p.numel() for p in loop.parameters)
            say(f"{total:,} parameters; tokens by domain: {names}")
            if loop.step:
                say(f"going on after step {loop.step}")
            if loop.moved:
                say(f"the last bits of the losses may differ: {', '.join(loop.moved)}")

    def __call__(self, entry: dict[str, Any]) -> None:
        if self.quiet:
            return
        at = f"step {entry['step']:>{len(str(self.steps))}}/{self.steps}"
        if found := entry.get("evaluation"):
            say(f"{at}  held out: {_measures(found)}")
        elif entry["step"] % self.every == 0 or entry["step"] in (1, self.steps):
            parts = [at, f"loss {entry['loss']:.4f}", f"rate {entry['rate']:.2e}", f"{entry['tokens_per_second']:,.0f} tokens/s"]
            if "maxvio" in entry:
                parts += [f"MaxVio {entry['maxvio']:.2f}", f"active {entry['active']:.2f}", f"dropped {entry['dropped']:.1%}"]
            left = (self.steps - entry["step"]) * entry["seconds"]
            say("  ".join([*parts, f"{left // 60:.0f} min {left % 60:.0f} s left"]))


@contextmanager
def stopping() -> Iterator[Any]:
    """Turns the first Ctrl-C or SIGTERM into a wish that the loop sees after its step; the second Ctrl-C ends at once."""
    wished: list[int] = []

    def wish(number: int, frame: Any) -> None:
        if wished and number == signal.SIGINT:
            raise KeyboardInterrupt
        wished.append(number)
        print("\nstopping after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, wish) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(wished)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(train)
