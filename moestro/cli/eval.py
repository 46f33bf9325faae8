"""`moestro eval`: what a changed model is worth beside the one it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Json, Memory, Model, Quiet, Threads
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, say

if TYPE_CHECKING:
    from moestro.core.plans.compression import CompressionPlan, TaskScore
    from moestro.evaluate.comparison import Comparison
    from moestro.evaluate.scoring import TaskSet
    from moestro.profile.data import Texts

EPILOG = """Examples:

\b
  moestro eval ./smaller --against ./model --data held-out.txt
  moestro eval ./smaller --against ./model --data held-out.txt --tokens 20000 --memory 4GiB
  moestro eval ./smaller --against ./model --tasks arc_easy,gsm8k --limit 200
  moestro eval ./smaller --against ./model --tasks my_task --task-folder ./tasks --fewshot 5

Use text that was not profiled: on that text any choice looks better than it is. Tasks are those of lm-eval (pip install 'moestro[eval]',
listed by lm_eval ls tasks) and those that --task-folder describes in its YAML; Python code that these name is run. Both models answer the
same documents, and what is told is also how many they answer differently. What is found is written into the folder's moestro.json
and README.md, and into --plan."""


def evaluate(
    model: Model,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The original.", show_default=False)],
    data: Annotated[
        list[str] | None, typer.Option(metavar="DATA", help="Text to read; may be repeated.", show_default=False)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Tasks of lm-eval to score both models on; may be repeated.", show_default=False),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="More tasks, as YAML of lm-eval.", show_default=False)
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question; by default the task's own number.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask this many documents of each task.", show_default=False)] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Read this many tokens.", show_default=False)] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Write what is found into this plan as well.", show_default=False)
    ] = None,
    memory: Memory = None,
    runner: Annotated[str, typer.Option(help="engine (any size), transformers (in memory), or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare MODEL with the original: perplexity, KL divergence of its predictions, how often its routers choose alike, and tasks."""
    from dataclasses import asdict, replace

    from moestro.cli.compress import read_compression
    from moestro.cli.profile import _opened
    from moestro.cli.run import check_target
    from moestro.compress.record import MANIFEST, read_plan_of, update_record
    from moestro.core.plans.compression import Judged
    from moestro.models.hub import locate
    from moestro.profile.sources import read

    if not data and not tasks:
        bad_argument("there is neither --data nor --tasks", "text to read, tasks to ask, or both")
    if not tasks and (task_folder or fewshot is not None or limit is not None):
        bad_argument("--task-folder, --fewshot or --limit is given and no --tasks", "names of tasks", "add --tasks NAME")
    made = read_plan_of(locate(model))
    given = read_compression(plan) if plan is not None else None
    if given is not None and given.layers != made.layers:
        bad_argument(f"{plan} is not the plan that {model} was made by", "that plan, or none")
    check_target(locate(model) / MANIFEST, "place for the model: what is found is written into its folder")
    if plan is not None:
        check_target(plan, "--plan")
    documents = read(data) if data else []
    asked = _asked(tasks, task_folder, fewshot, limit, against, quiet) if tasks else None
    room = max(length if data else 2, asked[1] if asked else 2)
    with _opened(against, runner, memory, dtype, threads, room) as original:
        made.check(original.facts)
        with _opened(model, runner, memory, dtype, threads, room) as changed:
            texts = _cut(documents, against, min(length, original.facts.context, changed.facts.context), tokens) if data else None
            found = _read(changed, original, texts, made) if texts is not None else None
            scores = _scores(asked[0], changed, original, against, quiet) if asked else ()
    judged = Judged(tasks=scores)
    if found is not None and data:
        judged = Judged(
            ", ".join(Path(d).name for d in data),
            found.quality.tokens,
            found.quality.perplexity,
            found.reference.perplexity,
            found.quality.kl,
            found.kl_error,
            found.agreement,
            found.skipped,
            scores,
        )
    if not quiet and texts is not None and texts.digest == made.inputs.get("profile"):
        say("this is the text that the plan was made from: what it costs on other text will be more")
    made = replace(made, judged=(*made.judged, judged))
    update_record(made, locate(model))
    if given is not None and plan is not None:
        replace(given, judged=(*given.judged, judged)).save(plan)
    if as_json:
        more = {} if found is None else {"loss": judged.loss, "agreement_by_layer": list(found.agreement_L)}
        emit(asdict(judged) | {"tasks": [asdict(score) | {"chance": score.chance} for score in scores]} | more)
    else:
        print("\n".join(judged.summary()))


def _cut(documents: Any, against: str, length: int, tokens: int | None) -> Texts:
    from moestro.cli.profile import _tokenizer
    from moestro.profile.data import cut

    return cut(documents, _tokenizer(against), length=length, tokens=tokens)


def _read(changed: Any, original: Any, texts: Texts, made: CompressionPlan) -> Comparison:
    from moestro.evaluate.comparison import compare

    sequences = [s.tokens_T.tolist() for s in texts.sequences if len(s.tokens_T) > 1]
    origins = [[la.slots[row.slot].sources for row in la.routed] for la in made.layers]
    return compare(changed, original, sequences, origins)


def _asked(
    tasks: list[str], folder: Path | None, fewshot: int | None, limit: int | None, against: str, silent: bool
) -> tuple[TaskSet, int]:
    """The tasks with their documents, and the tokens that the longest of their requests needs."""
    from moestro.cli.profile import _tokenizer

    check_harness()
    from moestro.evaluate.scoring import find_tasks, longest

    names = [name.strip() for text in tasks for name in text.split(",")]
    with _bars("looking for the tasks", silent):
        found = find_tasks(list(dict.fromkeys(names)), folder, fewshot=fewshot, limit=limit)
    if found.fixed and not silent:
        say(f"--fewshot does not change what takes no examples: {', '.join(found.fixed)}")
    if (tokenizer := _tokenizer(against)) is None:
        bad_argument(f"{against} has no tokenizer.json", "a model with its tokenizer: tasks are texts")
    return found, longest(found, tokenizer)


def check_harness() -> None:
    """Raises InputError when lm-eval is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        bad_argument("tasks need the package lm-eval, which is not installed", fix="pip install 'moestro[eval]'")


def _scores(asked: TaskSet, changed: Any, original: Any, against: str, silent: bool) -> tuple[TaskScore, ...]:
    from moestro.cli.profile import _tokenizer
    from moestro.evaluate.scoring import paired, score
    from moestro.evaluate.tasks import TaskModel

    most = min(original.facts.context, changed.facts.context)
    results = []
    for what, running in (("asking the original", original), ("asking the changed model", changed)):
        read = TaskModel(running, _tokenizer(against), max_length=most)
        with _bars(what, silent):
            results.append(score(asked, read))
    if read.cut and not silent:
        say(f"{read.cut} requests have more than {most} tokens, the context, and lost their beginning")
    return paired(asked, results[1], results[0])


@contextmanager
def _bars(what: str, silent: bool) -> Iterator[None]:
    """Within, the bars and remarks of lm-eval and of what loads its data are shown at a terminal, and nowhere else."""
    import io
    import sys
    from contextlib import redirect_stderr

    if silent or not sys.stderr.isatty():
        with redirect_stderr(io.StringIO()):
            yield
        return
    say(what)
    yield


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EPILOG)(evaluate)
