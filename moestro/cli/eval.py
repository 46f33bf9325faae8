"""`moestro eval`: what a changed model is worth beside the one it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.arguments import Json, Memory, Model, Quiet, Threads
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, say

EPILOG = """Examples:

\b
  moestro eval ./smaller --against ./model --data held-out.txt
  moestro eval ./smaller --against ./model --data held-out.txt --tokens 20000 --memory 4GiB

Use text that was not profiled: on that text any choice looks better than it is. What is found is written into the folder's moestro.json
and README.md, and into --plan."""


def evaluate(
    model: Model,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The original.", show_default=False)],
    data: Annotated[list[str], typer.Option(metavar="DATA", help="Text to read; may be repeated.", show_default=False)],
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
    """Compare MODEL with the original: perplexity, KL divergence of its predictions, and how often its routers choose alike."""
    from dataclasses import asdict, replace

    from moestro.cli.compress import read_compression
    from moestro.cli.profile import _opened, _tokenizer
    from moestro.cli.run import check_target
    from moestro.compress.record import MANIFEST, read_plan_of, update_record
    from moestro.core.plans.compression import Judged
    from moestro.evaluate.comparison import compare
    from moestro.models.hub import locate
    from moestro.profile.data import cut
    from moestro.profile.sources import read

    made = read_plan_of(locate(model))
    given = read_compression(plan) if plan is not None else None
    if given is not None and given.layers != made.layers:
        bad_argument(f"{plan} is not the plan that {model} was made by", "that plan, or none")
    check_target(locate(model) / MANIFEST, "place for the model: what is found is written into its folder")
    if plan is not None:
        check_target(plan, "--plan")
    documents = read(data)
    with _opened(against, runner, memory, dtype, threads, length) as original:
        made.check(original.facts)
        with _opened(model, runner, memory, dtype, threads, length) as changed:
            limit = min(length, original.facts.context, changed.facts.context)
            texts = cut(documents, _tokenizer(against), length=limit, tokens=tokens)
            sequences = [s.tokens_T.tolist() for s in texts.sequences if len(s.tokens_T) > 1]
            origins = [[la.slots[row.slot].sources for row in la.routed] for la in made.layers]
            found = compare(changed, original, sequences, origins)
    assert found.quality.kl is not None
    judged = Judged(
        ", ".join(Path(d).name for d in data),
        found.quality.tokens,
        found.quality.perplexity,
        found.reference.perplexity,
        found.quality.kl,
        found.kl_error,
        found.agreement,
        found.skipped,
    )
    if not quiet and texts.digest == made.inputs.get("profile"):
        say("this is the text that the plan was made from: what it costs on other text will be more")
    made = replace(made, judged=(*made.judged, judged))
    update_record(made, locate(model))
    if given is not None and plan is not None:
        replace(given, judged=(*given.judged, judged)).save(plan)
    if as_json:
        emit(asdict(judged) | {"loss": judged.loss, "agreement_by_layer": list(found.agreement_L)})
    else:
        print(made.summary().splitlines()[-1])


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EPILOG)(evaluate)
