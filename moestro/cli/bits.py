"""`moestro plan bits`: weights in few bits, one codec for all experts or bits by what they matter, and the trunk with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import Json, Model, Quiet, Revision, method_choice, with_revision
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, progress, say

if TYPE_CHECKING:
    from moestro.core.plans.residency import Precision
    from moestro.models.layout import Layout

EPILOG = """Examples:

\b
  moestro profile ./model book.txt --probe inputs -o book.profile
  moestro plan bits ./model --method gptq --codec uint4:64 --profile book.profile --trunk int8:32 --ends int8:32 -o plan.json
  moestro plan bits ./model --codec int2:128,int3:128,int4:128 --bits 2.5 --budget mc_moe --profile book.profile --evidence bits.evidence --trunk int8:32 --ends int8:32 -o plan.json
  moestro plan bits ./model --method gptq --codec int4:64 --smooth eaquant --profile book.profile --allow-plain -o plan.json
  moestro plan residency ./model --quality ppl:2% --data text.txt --precision edgemoe --widths int2:32,int4:32 -m 2GiB -o widths.json
  moestro plan bits ./model --widths widths.json --method gptq --profile book.profile --allow-plain -o plan.json
  moestro apply plan.json -o ./small
  moestro run ./small "Hello"

With several codecs every expert is tried in each, which takes as long as encoding the model as often. --evidence FILE keeps what that
showed after every layer: the same command goes on after an interruption, and other --bits and --budget take seconds.

Matrices that would stay as they are stored make the exit code 1, unless --allow-plain is given, and so do experts that no token of the
profile was routed to, unless --allow-unseen is; the plan is written in any case. Norms keep their numbers but for the powers of two of
--smooth; routers stay as they are without --router."""


def bits(
    model: Model,
    codec: Annotated[
        str, typer.Option(metavar="CODEC[,CODEC...]", help="Such as uint4:64; several, the fewest bits first, to choose from.")
    ] = "uint4:64",
    method: Annotated[
        str, typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="How weights are rounded (moestro methods --kind encode).")
    ] = "rtn",
    bits: Annotated[
        float | None, typer.Option(help="Average bits of an expert's weight, scales included.", show_default=False)
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="What chooses between codecs (moestro methods --kind bits).")
    ] = "mc_moe",
    smooth: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]", help="Rescale inputs first (moestro methods --kind smooth).", show_default=False
        ),
    ] = "",
    router: Annotated[
        str,
        typer.Option(
            metavar="NAME[:OPTION=VALUE,...]",
            help="Round routers too (moestro methods --kind encode_router).",
            show_default=False,
        ),
    ] = "",
    trunk: Annotated[str, typer.Option(metavar="CODEC", help="Of attention, shared experts and dense layers.")] = "stored",
    ends: Annotated[str, typer.Option(metavar="CODEC", help="Of the embedding and the output layer.")] = "stored",
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A profile made with --probe inputs.", show_default=False)
    ] = None,
    after: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Start from what this compression plan makes.", show_default=False)
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --bits: keep here what each codec does to each expert, and go on from it.",
            show_default=False,
        ),
    ] = None,
    widths: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN",
            help="Take each expert's codec from this plan of `moestro plan residency --quality`.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here.", show_default=False)
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Tensors the model does not load that may be lost; may be repeated.", show_default=False
        ),
    ] = None,
    protect: Annotated[bool, typer.Option(help="Super Experts get the widest of several codecs.")] = True,
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="Matrices that stay as they are stored are no failure.")
    ] = False,
    allow_unseen: Annotated[bool, typer.Option("--allow-unseen", help="Experts that were never seen are no failure.")] = False,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Decide in how many bits weights are kept. Changes nothing yet."""
    from dataclasses import replace

    from moestro.cli.compress import check_plan, read_compression, read_profile
    from moestro.cli.run import check_target
    from moestro.compress.bits import BitsWish, plan_bits
    from moestro.compress.trunk import told, trunk_matrices
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    if output is not None:
        check_target(output, "--output")
    if evidence is not None:
        if bits is None:
            bad_argument("--evidence without --bits", "--bits, for which several codecs are tried")
        check_target(evidence, "--evidence")
    name, options = method_choice(method)
    chooser, chooser_options = method_choice(budget)
    rescaling, rounding = method_choice(smooth), method_choice(router)
    wish = BitsWish(
        name,
        tuple(codec.split(",")),
        options,
        bits,
        chooser,
        chooser_options,
        trunk,
        ends,
        *rescaling,
        *rounding,
        tuple(drop or ()),
        protect=protect,
    )
    checkpoint = Checkpoint.open(with_revision(model, revision))
    layout, seen = describe(checkpoint), read_profile(profile)
    if widths is not None:
        if codec != "uint4:64":
            bad_argument("--codec beside --widths", "one of them: the plan gives every expert its codec")
        wish = replace(wish, chosen=read_precision(widths, layout))
    with progress("planning", "layers", quiet or as_json) as report:
        found = plan_bits(
            checkpoint,
            layout,
            wish,
            profile=seen,
            profile_path=str(profile or ""),
            base=read_compression(after) if after is not None else None,
            evidence=evidence,
            progress=report,
        )
    check_plan(found.plan, checkpoint, layout, seen)
    if output is not None:
        found.plan.save(output)
        if not quiet:
            say(f"written to {output}")
    if as_json:
        emit(found.plan.to_json())
    else:
        print(found.plan.summary())
    if found.unseen and not allow_unseen:
        say(f"{len(found.unseen)} experts were never seen; profile more text, or allow it: --allow-unseen")
    if found.plain and not allow_plain:
        say(told(found.plain, trunk_matrices(checkpoint, layout), "--trunk and --ends a codec"))
    return 1 if (found.unseen and not allow_unseen) or (found.plain and not allow_plain) else 0


def read_precision(path: Path, layout: Layout) -> Precision:
    """The widths in a residency plan. Raises PlanError for a plan without any, or of another model."""
    from moestro.core.errors import PlanError
    from moestro.core.plan import read_plan
    from moestro.core.plans.residency import ResidencyPlan

    found = read_plan(path)
    if not isinstance(found, ResidencyPlan) or found.precision is None:
        raise PlanError(
            f"{path} gives experts no widths",
            expected="a residency plan with widths of its own",
            fix="moestro plan residency MODEL --quality ppl:2% --data TEXT --precision edgemoe --widths int2:32,int4:32 -o PLAN",
        )
    found.check(layout.facts)
    return found.precision
