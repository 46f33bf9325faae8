"""`moestro plan`: decide something and write it down. `residency`: what stays in memory and what is streamed. METHOD: see cli.compress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, say

if TYPE_CHECKING:
    from moestro.models.checkpoint import Checkpoint

EPILOG = """Examples:

\b
  moestro plan residency allenai/OLMoE-1B-7B-0924 --memory 4GiB -o plan.json
  moestro plan residency ./model --memory 2GiB --trace talk.trace -o plan.json   policies chosen by replay
  moestro plan residency ./model --memory 2GiB --quality ppl:1% --data text.txt -o plan.json   as few bits as that allows
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
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="BOUND",
            help="Give experts as few bits as this allows, measured on --data: ppl:1% (perplexity) or kl:0.02 (nats per token).",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text for --quality; half of it chooses, half is held out.", show_default=False),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who chooses the bits (moestro methods --kind precision); edgemoe.", show_default=False
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            metavar="CODECS",
            help="To choose from, the fewest bits first, such as int4:32,int8:32 or nested:32/2,nested:32.",
            show_default=False,
        ),
    ] = None,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decide which experts are kept in memory, from headers, a disk probe and maybe a trace. Loads nothing, but for --quality."""
    from moestro.cli.run import check_target
    from moestro.core.trace import Trace
    from moestro.engine import memory as accounting
    from moestro.engine.quality import plan_quality
    from moestro.engine.residency import plan_residency
    from moestro.engine.sizes import parse_size
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    if output is not None:
        check_target(output, "--output")
    checkpoint = Checkpoint.open(with_revision(model, revision))
    layout = describe(checkpoint)
    budget = parse_size(memory) if memory is not None else accounting.available() * 9 // 10
    options = residency_options(context, dtype, eviction, predictor, scope, trunk, trunk_codec)
    options |= {name: value for name, value in (("batch", batch), ("codec", codec)) if value is not None}
    options["trace"] = Trace.open(trace) if trace is not None else None
    if quality is None:
        if data is not None or precision is not None or widths is not None:
            bad_argument("--data, --precision or --widths is given and no --quality", "a bound, such as --quality ppl:1%")
        plan = plan_residency(checkpoint, layout, budget, **options)
    else:
        if data is None:
            bad_argument("there is a --quality and no text", "a text file with --data")
        if codec is not None:
            bad_argument("there are a --quality and a --codec", "one of them", "name the codecs to choose from with --widths")
        options |= {"precision": precision} if precision is not None else {}
        options |= {"widths": widths.split(",")} if widths is not None else {}
        options["report"] = (lambda text: None) if quiet else say
        plan = plan_quality(checkpoint, layout, budget, quality=quality, tokens=read_tokens(checkpoint, data), **options)
    if output is not None:
        plan.save(output)
        if not quiet:
            say(f"written to {output}")
    if as_json:
        emit(plan.to_json())
    else:
        print(plan.summary())


def read_tokens(checkpoint: Checkpoint, data: Path) -> list[int]:
    """The tokens of a text file. Raises InputError, CheckpointError."""
    from moestro.cli.prompts import decoded
    from moestro.models.tokenizer import Tokenizer

    try:
        raw = data.read_bytes()
    except OSError as error:
        bad_argument(f"{data} cannot be read: {error.strerror}", "a text file")
    return Tokenizer.open(checkpoint.path).encode(decoded(raw, str(data)), add_special=False)


def register(app: typer.Typer) -> None:
    from moestro.cli import bits, compress, tasks

    group = typer.Typer(
        cls=compress.PlanGroup,
        help="Decide what will be done, as a file to read, compare and keep.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command(epilog=EPILOG)(residency)
    group.command("compress", epilog=compress.EPILOG)(compress.plan)
    group.command("bits", epilog=bits.EPILOG)(bits.bits)
    group.command("tasks", epilog=tasks.EPILOG)(tasks.tasks)
    group.callback()(lambda: None)
    app.add_typer(group, name="plan")
