"""`moestro plan`: decide something and write it down. `residency`: what stays in memory and what is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.arguments import (
    CodecChoice,
    Context,
    Dtype,
    EvictionChoice,
    Json,
    Memory,
    Model,
    PredictorChoice,
    Quiet,
    Revision,
    Scope,
    TrunkChoice,
    TrunkCodecChoice,
    residency_options,
    with_revision,
)
from moestro.cli.output import emit, say

EPILOG = """Examples:

\b
  moestro plan residency allenai/OLMoE-1B-7B-0924 --memory 4GiB -o plan.json
  moestro plan residency ./model --memory 2GiB --trace talk.trace -o plan.json   policies chosen by replay
  moestro run ./model "Hello" --plan plan.json"""


def residency(
    model: Model,
    memory: Memory = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Choose policies by replaying this trace.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here.", show_default=False)
    ] = None,
    context: Context = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once.", show_default=False)] = None,
    dtype: Dtype = None,
    eviction: EvictionChoice = None,
    predictor: PredictorChoice = None,
    scope: Scope = None,
    trunk: TrunkChoice = None,
    trunk_codec: TrunkCodecChoice = None,
    codec: CodecChoice = None,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decide which experts are kept in memory, from headers, a disk probe and maybe a trace. Loads nothing."""
    from moestro.core.trace import Trace
    from moestro.engine import memory as accounting
    from moestro.engine.residency import plan_residency
    from moestro.engine.sizes import parse_size
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    checkpoint = Checkpoint.open(with_revision(model, revision))
    layout = describe(checkpoint)
    budget = parse_size(memory) if memory is not None else accounting.available() * 9 // 10
    options = residency_options(context, dtype, eviction, predictor, scope, trunk, trunk_codec)
    options |= {name: value for name, value in (("batch", batch), ("codec", codec)) if value is not None}
    plan = plan_residency(checkpoint, layout, budget, trace=Trace.open(trace) if trace is not None else None, **options)
    if output is not None:
        plan.save(output)
        if not quiet:
            say(f"written to {output}")
    if as_json:
        emit(plan.to_json())
    else:
        print(plan.summary())


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Decide what will be done, as a file to read, compare and keep.", no_args_is_help=True, rich_markup_mode=None
    )
    group.command(epilog=EPILOG)(residency)
    group.callback()(lambda: None)
    app.add_typer(group, name="plan")
