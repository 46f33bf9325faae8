"""`moestro apply`: carry out a plan. What was interrupted continues with the same command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import CodecChoice, Json, Quiet, TrunkCodecChoice
from moestro.cli.output import emit, progress, say, size

if TYPE_CHECKING:
    from moestro.core.plans.residency import ResidencyPlan

EPILOG = """Examples:

\b
  moestro apply plan.json -o ./store                     pack the experts as the plan says
  moestro run MODEL "Hello" --plan plan.json --store ./store
  moestro apply plan.json -o ./store4 --codec int4:32 --trunk-codec int4:32   fewer bytes: runs then say SHRUNK
  moestro run MODEL "Hello" --memory 4GiB --store ./store4
  moestro apply half.json -o ./smaller                   write the smaller model that a compression plan describes"""


def apply(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file made by `moestro plan`.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the result goes.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Where the model is now, if not where the plan says.", show_default=False)
    ] = None,
    codec: CodecChoice = None,
    trunk_codec: TrunkCodecChoice = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where a compression plan's profile is now.", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do what a plan says. A residency plan packs the model's experts, one aligned record each, for faster reads, and a quantised trunk.

    A compression plan writes a new model folder. --codec and --trunk-codec are used instead of a residency plan's.
    """
    from moestro.cli import compress
    from moestro.cli.errors import bad_argument
    from moestro.core.errors import PlanError
    from moestro.core.plan import read_plan
    from moestro.core.plans.compression import CompressionPlan
    from moestro.core.plans.residency import ResidencyPlan

    read = read_plan(plan)
    if isinstance(read, CompressionPlan):
        if codec is not None or trunk_codec is not None:
            bad_argument("--codec and --trunk-codec are for residency plans", "a plan that says its codecs itself")
        compress.apply(read, output, model, profile, quiet, as_json)
        return
    if profile is not None:
        bad_argument("--profile is for compression plans", "none")
    if not isinstance(read, ResidencyPlan):
        raise PlanError(
            f"{plan} is a {read.kind} plan",
            expected="a residency or a compression plan",
            fix="moestro plan residency MODEL --memory SIZE",
        )
    done = pack(read, output, model, codec, trunk_codec, quiet)
    if as_json:
        emit(done)
    else:
        trunk = "" if done["trunk_codec"] == "stored" else f" and the trunk as {done['trunk_codec']}"
        print(f"{done['experts']} experts packed as {done['codec']}{trunk} in {done['output']}, {size(done['bytes'])}")


def pack(
    plan: ResidencyPlan, output: Path, model: str | None, codec: str | None, trunk_codec: str | None, quiet: bool
) -> dict[str, Any]:
    """Pack the experts of the plan's model into `output` and say what was written."""
    from dataclasses import replace

    from moestro.engine import pack as packing
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    checkpoint = Checkpoint.open(model or plan.subjects[0].path)
    layout = describe(checkpoint)
    plan = replace(plan, codec=codec or plan.codec, trunk_codec=trunk_codec or plan.trunk_codec)
    with progress("packing", "experts", quiet) as report:
        try:
            folder = packing.apply(plan, checkpoint, layout, output, report)
        except KeyboardInterrupt:
            say("packing was interrupted; the same command continues where it stopped")
            raise
    return {
        "output": str(folder),
        "codec": plan.codec,
        "trunk_codec": plan.trunk_codec,
        "experts": sum(layer.num_experts for layer in layout.facts.layers),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
    }


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(apply)
