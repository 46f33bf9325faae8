"""`moestro plan tasks`: which experts each task needs, and how a query's task is known; `moestro run --tasks` obeys it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moestro.cli.arguments import Json, Model, Quiet, Revision, with_revision
from moestro.cli.output import emit, say

if TYPE_CHECKING:
    from moestro.core.plans.tasks import TaskPlan

EPILOG = """Examples:

\b
  moestro profile ./model math.txt -o math.profile --for premoe
  moestro profile ./model code.txt -o code.profile --for premoe
  moestro plan tasks ./model --profile math=math.profile --profile code=code.profile --keep 16 -o tasks.json
  moestro run ./model "def add(a, b):" --memory 2GiB --tasks tasks.json

Each prompt is read up to the first router; the task whose profile is nearest decides which experts are open, and no others are loaded."""


def tasks(
    model: Model,
    profile: Annotated[
        list[str], typer.Option(metavar="[NAME=]FILE", help="A task's profile; give one for each task.", show_default=False)
    ],
    keep: Annotated[int, typer.Option(min=1, help="Experts of each layer that a task keeps.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here.", show_default=False)
    ] = None,
    positive: Annotated[bool, typer.Option(help="Count router logits above 0 only.")] = True,
    protect: Annotated[bool, typer.Option(help="Every task keeps Super Experts, where a profile looked for them.")] = True,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decide which experts each task needs, from a profile of each. Changes nothing: the model's folder stays as it is."""
    from moestro.cli.run import check_target
    from moestro.compress.retrieval import retrieval
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe
    from moestro.profile.profile import Profile

    if output is not None:
        check_target(output, "--output")
    checkpoint = Checkpoint.open(with_revision(model, revision))
    named = [(name or Path(file).stem, file) for name, _, file in (_split(text) for text in profile)]
    profiles = [(name, Profile.open(Path(file))) for name, file in named]
    made = retrieval(profiles, describe(checkpoint).facts, checkpoint.source, keep=keep, positive=positive, protect=protect)
    if output is not None:
        made.save(output)
        if not quiet:
            say(f"written to {output}")
    if as_json:
        emit(made.to_json())
    else:
        print(made.summary())


def _split(text: str) -> tuple[str, str, str]:
    name, equals, file = text.partition("=")
    return (name, equals, file) if equals else ("", "", text)


def read_tasks(path: Path) -> TaskPlan:
    """Raises PlanError."""
    from moestro.core.errors import PlanError
    from moestro.core.plan import read_plan
    from moestro.core.plans.tasks import TaskPlan

    found = read_plan(path)
    if not isinstance(found, TaskPlan):
        raise PlanError(
            f"{path} is a {found.kind} plan", expected="a plan of tasks", fix="moestro plan tasks MODEL --profile FILE ..."
        )
    return found
