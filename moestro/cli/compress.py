"""Compression on the command line: `moestro plan METHOD MODEL`, and what `moestro apply` does with such a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moestro.cli.arguments import Json, Model, Quiet, Revision, method_choice, with_revision
from moestro.cli.output import emit, progress, say, size

if TYPE_CHECKING:
    from moestro.compress.executor import Job
    from moestro.core.plans.compression import CompressionPlan
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.layout import Layout
    from moestro.profile.profile import Profile

EPILOG = """Examples:

\b
  moestro profile ./model book.txt -o book.profile --for reap --probe maxima
  moestro plan reap ./model --profile book.profile --ratio 0.25 -o plan.json        remove a quarter of the experts
  moestro plan hierarchical ./model --profile book.profile --keep 32 -o plan.json   merge what is alike
  moestro plan contribution ./model --profile book.profile --after plan.json --ratio 0.5 -o both.json
  moestro plan moe_pruner:pattern=2:4 ./model --profile book.profile -o sparse.json
  moestro plan gptq ./model --profile book.profile --after plan.json --codec int4:64 --trunk-codec int8:64 -o small.json
  moestro plan odp:share=0.5 ./model --profile book.profile -o skip.json            skip experts at run time
  moestro apply plan.json -o ./smaller
  moestro eval ./smaller --against ./model --data held-out.txt

METHOD is one of `moestro methods --kind criterion` (remove experts), search (remove experts, trying sets), group (merge), neurons (narrower
experts), sparsify, share or encode (other weights), skip (at run time), by its name or the last part of it. `moestro plan METHOD ...` is `moestro plan compress METHOD ...`.
Experts that the profile never saw make the exit code 1, unless --allow-unseen is given, and so do, beside encoded experts, matrices that
stay as they are stored, unless --allow-plain is; the plan is written in any case."""


class PlanGroup(TyperGroup):
    """`moestro plan METHOD` for `moestro plan compress METHOD`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["compress", *args]
        return super().resolve_command(ctx, args)


def plan(
    method: Annotated[str, typer.Argument(metavar="METHOD[:OPTION=VALUE,...]", help="A compression method.", show_default=False)],
    model: Model,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the model's experts did, by `moestro profile`.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here.", show_default=False)
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="The share of experts (or neurons) to remove.", show_default=False)] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Experts of each layer (or neurons of each expert) to keep.", show_default=False)
    ] = None,
    budget: Annotated[
        str, typer.Option(metavar="NAME", help="How many each layer keeps (moestro methods --kind budget).")
    ] = "uniform",
    fuse: Annotated[
        str, typer.Option(metavar="NAME", help="How a group becomes one expert (moestro methods --kind fuse).")
    ] = "frequency",
    align: Annotated[bool, typer.Option(help="Put neurons in a common order before merging.")] = True,
    router: Annotated[
        str, typer.Option(help="Of merged experts: keep the dominant's row, the mean of their rows, or repoint all rows.")
    ] = "dominant",
    codec: Annotated[str, typer.Option(help="Of a method of kind encode: the number format, such as int4:64.")] = "stored",
    trunk_codec: Annotated[
        str | None,
        typer.Option(
            help="Of a method of kind encode: the number format of attention, shared experts, embedding and head.",
            show_default=False,
        ),
    ] = None,
    protect: Annotated[bool, typer.Option(help="Keep Super Experts, whatever the method says.")] = True,
    after: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Start from what this plan makes; the result does both.", show_default=False),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Tensors the model does not load that may be lost; may be repeated.", show_default=False
        ),
    ] = None,
    allow_unseen: Annotated[bool, typer.Option("--allow-unseen", help="Experts that were never seen are no failure.")] = False,
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="Matrices that stay as they are stored beside encoded experts are no failure.")
    ] = False,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Decide what to remove, merge, narrow or encode, from a profile. Changes nothing yet."""
    from moestro.cli.run import check_target
    from moestro.compress.planner import Wish, plan_compression, unseen_experts
    from moestro.compress.trunk import plain_matrices, told, trunk_matrices
    from moestro.core.plans.compression import STORED
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    if output is not None:
        check_target(output, "--output")
    name, options = method_choice(method)
    wish = Wish(
        keep=keep, ratio=ratio, budget=budget, fuse=fuse, align=align, router=router, codec=codec, trunk_codec=trunk_codec, protect=protect,
        dropped=tuple(drop or ()), options=options,
    )  # fmt: skip
    checkpoint = Checkpoint.open(with_revision(model, revision))
    layout = describe(checkpoint)
    seen = read_profile(profile)
    with progress("planning", "layers", quiet or as_json) as report:
        made = plan_compression(
            name,
            checkpoint,
            layout,
            wish,
            profile=seen,
            profile_path=str(profile or ""),
            base=read_compression(after) if after is not None else None,
            progress=report,
        )
    check_plan(made, checkpoint, layout, seen)
    if output is not None:
        made.save(output)
        if not quiet:
            say(f"written to {output}")
    if as_json:
        emit(made.to_json())
    else:
        print(made.summary())
    unseen = 0 if seen is None or allow_unseen else unseen_experts(seen)
    if unseen:
        say(f"{unseen} experts were never seen; profile more text, or allow it: --allow-unseen")
    found = trunk_matrices(checkpoint, layout)
    plain = () if allow_plain or codec == STORED else plain_matrices(found, made)
    if plain:
        say(told(plain, found, "--trunk-codec"))
    return 1 if unseen or plain else 0


def check_plan(plan: CompressionPlan, checkpoint: Checkpoint, layout: Layout, seen: Profile | None) -> None:
    """What `moestro apply` would find before its work. Raises as `compress.executor.prepare`."""
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import prepare

    if seen is None and plan.encodings and plan.profile and Path(plan.profile).exists():
        seen = read_profile(Path(plan.profile))
    prepare(plan, checkpoint, layout, encoder=Encoder(plan, layout.facts, seen), form=form_of(plan))


def form_of(plan: CompressionPlan) -> type[Job] | None:
    """How the result is written: in tiles where an encoding has a codec, else as the original is."""
    from moestro.compress.export.coded import CodedJob
    from moestro.core.plans.compression import STORED

    return CodedJob if any(e.codec != STORED for e in plan.encodings) else None


def read_profile(path: Path | None) -> Profile | None:
    """A profile without its trace."""
    from moestro.profile.profile import Profile

    return None if path is None else Profile.open(path)


def read_compression(path: Path) -> CompressionPlan:
    """A compression plan. Raises PlanError."""
    from moestro.core.errors import PlanError
    from moestro.core.plan import read_plan
    from moestro.core.plans.compression import CompressionPlan

    found = read_plan(path)
    if not isinstance(found, CompressionPlan):
        raise PlanError(f"{path} is a {found.kind} plan", expected="a compression plan", fix="moestro plan METHOD MODEL -o PLAN")
    return found


def apply(plan: CompressionPlan, output: Path, model: str | None, profile: Path | None, quiet: bool, as_json: bool) -> None:
    """Write the model that the plan describes, and say what came out."""
    from moestro.compress.encoding import Encoder
    from moestro.compress.executor import compress
    from moestro.compress.stats import layer_stats
    from moestro.core.errors import PlanError
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    checkpoint = Checkpoint.open(model or plan.subjects[0].path)
    layout = describe(checkpoint)
    seen = read_profile(profile or (Path(plan.profile) if plan.encodings and plan.profile else None))
    if seen is not None:
        layer_stats(seen, layout.facts.fingerprint, len(layout.facts.layers))
        if seen.data != plan.inputs.get("profile"):
            raise PlanError(
                "the profile is of another text than the one the plan was made from", fix="name that one with --profile"
            )
    encoder = Encoder(plan, layout.facts, seen)
    form = form_of(plan)
    with progress("writing", "layers", quiet or as_json) as report:
        try:
            made = compress(plan, checkpoint, layout, output, encoder=encoder, form=form, progress=report)
        except KeyboardInterrupt:
            say("writing was interrupted; the same command continues where it stopped")
            raise
    done = {
        "output": str(output),
        "experts": plan.experts,
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "dropped": list(made.dropped),
    }
    if as_json:
        emit(done)
        return
    if made.dropped and not quiet:
        say(f"left out, as the plan allows: {', '.join(made.dropped[:3])}" + (" and more" if len(made.dropped) > 3 else ""))
    tiles = " in tiles" if form is not None else ""
    print(f"{output}: {plan.experts} experts per layer{tiles}, {size(made.bytes_after)} of {size(made.bytes_before)}")
