"""`moestro run`: generate text with a model, within a memory budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import (
    Context,
    Dtype,
    EvictionChoice,
    Json,
    Memory,
    PredictorChoice,
    Quiet,
    Revision,
    Scope,
    Threads,
    TrunkChoice,
    TrunkCodecChoice,
    residency_options,
)
from moestro.cli.errors import INTERRUPTED, bad_argument
from moestro.cli.output import emit, progress, say, size

if TYPE_CHECKING:
    from moestro.engine.engine import Engine
    from moestro.engine.generate import Generation
    from moestro.engine.sample import SamplingParams

EPILOG = """Examples:

\b
  moestro run "Why is the sky blue?"                         the embedded model
  moestro run allenai/OLMoE-1B-7B-0924-Instruct --memory 4GiB   a chat at the terminal
  moestro run ./model "Hello" -m 2GiB -n 64 --temperature 0.7 --top-p 0.9 --seed 1
  cat letter.txt | moestro run ./model -                     a prompt from standard input
  moestro run ./model --raw -p "Once upon a time" --json
  moestro run ./model --batch prompts.txt --trace talk.trace
  moestro run ./model "Hello" --plan plan.json --store ./store

The answer goes to standard output, statistics to standard error. Ctrl-C ends an answer (exit code 130)."""

MOST_AT_ONCE = 8  # prompts of a --batch answered together; more cost KV cache and gain little on a processor


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="Hub id, org/name@revision or folder; then the prompt, or - for standard input.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt, - for standard input.", show_default=False)
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer every line of a text file.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.", show_default=False)] = None,
    memory: Memory = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Follow this residency plan.", show_default=False)] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Read experts from this packed store.", show_default=False)
    ] = None,
    context: Context = None,
    dtype: Dtype = None,
    threads: Threads = None,
    eviction: EvictionChoice = None,
    predictor: PredictorChoice = None,
    scope: Scope = None,
    trunk: TrunkChoice = None,
    trunk_codec: TrunkCodecChoice = None,
    quality: Annotated[
        int | None,
        typer.Option(min=2, max=4, help="Use at most this many bits of experts packed as nested.", show_default=False),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Load the experts of the prompt's task alone, by `moestro plan tasks`.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", "--n-predict", help="Tokens of the answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that together have this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only those at least this likely relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen before less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.", show_default=False)
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens whatever the model says.")] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Record the routing.", show_default=False)] = None,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Answer one prompt, every line of a file, or chat at the terminal. Without MODEL an embedded one is used."""
    from moestro.cli.prompts import from_file, from_stdin, model_and_prompt
    from moestro.engine.sample import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    model, text = model_and_prompt(words or [], prompt)
    prompts: list[str] | None = None
    if batch is not None:
        if text is not None:
            bad_argument("there is a prompt and --batch", "one of them")
        prompts = from_file(batch)
    elif text == "-" or (text is None and not sys.stdin.isatty()):
        prompts = [from_stdin()]
    elif text is not None:
        if not text.strip():
            bad_argument("the prompt is empty", "some text")
        prompts = [text]
    if prompts is None and (as_json or raw):
        bad_argument("there is no prompt", "a prompt with --json and with --raw", "give a prompt, or pipe one in")
    if trace is not None:
        check_target(trace)
    options = residency_options(context, dtype, eviction, predictor, scope, trunk, trunk_codec)
    if quality is not None:
        if store is None:
            bad_argument(
                "there is a --quality and no --store",
                "experts packed as nested:G",
                "moestro apply PLAN --codec nested:32 -o FOLDER",
            )
        options["planes"] = quality
    if tasks is not None:
        from moestro.cli.tasks import read_tasks

        if prompts is not None and len(prompts) > 1:
            bad_argument("there are several prompts and --tasks", "one prompt at a time")
        options["tasks"] = read_tasks(tasks)
    if plan is None and prompts is not None and len(prompts) > 1:
        options["batch"] = min(len(prompts), MOST_AT_ONCE)
    with open_engine(model, revision, memory, plan, store, threads, trace is not None, options, quiet or as_json) as engine:
        try:
            if prompts is None:
                from moestro.cli.chat import chat

                return chat(engine, params, system, quiet)
            return answer(engine, prompts, params, raw, system, quiet, as_json)
        finally:
            if trace is not None and (recorded := engine.trace()).tokens:  # a run that did nothing leaves an older trace alone
                recorded.save(trace)


def check_target(path: Path, flag: str = "--trace") -> None:
    """Raises StorageError before the work when its result could not be written to this file after it. flag: what names it."""
    import os

    from moestro.core.errors import StorageError

    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise StorageError(
            f"nothing can be written to {path}",
            expected="a file in a folder that may be written to",
            fix=f"choose another {flag}",
        )


def open_engine(
    model: str | None,
    revision: str | None,
    memory: str | None,
    plan: Path | None,
    store: Path | None,
    threads: int | None,
    trace: bool,
    options: dict[str, Any],
    quiet: bool,
) -> Engine:
    """The engine of the model asked for, or of the embedded one."""
    from moestro.cli.arguments import with_revision
    from moestro.core.errors import BudgetError, PlanError
    from moestro.core.plan import read_plan
    from moestro.core.plans.residency import ResidencyPlan
    from moestro.engine.sizes import parse_size

    budget = parse_size(memory) if memory is not None else None
    read = None
    if plan is not None:
        read = read_plan(plan)
        if not isinstance(read, ResidencyPlan):
            raise PlanError(
                f"{plan} is a {read.kind} plan", expected="a residency plan", fix="moestro plan residency MODEL --memory SIZE"
            )
    if model is None and read is not None:
        model = read.subjects[0].path
    half = None
    if model is None:
        if revision is not None:
            bad_argument("there is a --revision and no model", "a model on the Hub")
        model, half = embedded(quiet)
    if not quiet:
        say(f"opening {model}")
    from moestro.engine.engine import Engine

    def opened(memory: int | None) -> Engine:
        return Engine.open(
            with_revision(model, revision), memory=memory, plan=read, store=store, threads=threads, trace=trace, **options
        )

    if half is None or budget is not None:
        return opened(budget)
    try:
        return opened(half)
    except BudgetError as error:  # torch takes more here than elsewhere, or the options ask for more
        if error.smallest is None:
            raise
        say(f"half of the model is not enough here; using {size(error.smallest)}")
        return opened(error.smallest)


def embedded(quiet: bool) -> tuple[str, int]:
    """The embedded model's folder, built if needed, and a budget of just under half of its size."""
    from moestro.build.upcycle.default import ensure_default_model
    from moestro.models.checkpoint import Checkpoint

    if quiet:
        folder = ensure_default_model()
    else:
        with progress("building the embedded model", "%") as report:
            folder = ensure_default_model(lambda what, share: report(round(100 * share), 100))
    return str(folder), sum(ref.nbytes for ref in Checkpoint.open(folder).tensors.values()) * 48 // 100


def answer(
    engine: Engine, prompts: list[str], params: SamplingParams, raw: bool, system: str | None, quiet: bool, as_json: bool
) -> int:
    """Generate and print; returns the exit code."""
    from moestro.cli.chat import stream

    asked: list[Any] = [prompt if raw else dialogue(engine, prompt, system) for prompt in prompts]
    generation = engine.generate(asked, params)
    if as_json:
        generation.run()
        emit(as_data(engine, prompts, generation))
    elif len(prompts) == 1:
        stream(generation)
    else:
        for number, (prompt, result) in enumerate(zip(prompts, generation.run())):
            print(f"{'' if number == 0 else chr(10)}[{number + 1}] {prompt}\n{result.text}", flush=True)
    if not quiet and not as_json and generation.statistics is not None:
        say("", generation.statistics.summary())
    return INTERRUPTED if generation.interrupted else 0


def dialogue(engine: Engine, prompt: str, system: str | None) -> Any:
    """What the model is given: messages for its chat template, or the text alone when it has none."""
    if not engine.tokenizer.templates:
        if system is not None:
            bad_argument(
                "there is a --system message and the model has no chat template", "a chat model", "put it into the prompt"
            )
        return prompt
    before = [{"role": "system", "content": system}] if system is not None else []
    return [*before, {"role": "user", "content": prompt}]


def as_data(engine: Engine, prompts: list[str], generation: Generation) -> dict[str, Any]:
    """Answers, statistics and the plan, JSON-ready."""
    from dataclasses import asdict

    assert generation.statistics is not None
    return {
        "model": engine.checkpoint.source,
        "fingerprint": engine.facts.fingerprint,
        "answers": [{"prompt": prompt, **asdict(result)} for prompt, result in zip(prompts, generation.results)],
        "interrupted": generation.interrupted,
        "statistics": generation.statistics.to_json(),
        "plan": engine.plan.to_json(),
    }


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(run)
