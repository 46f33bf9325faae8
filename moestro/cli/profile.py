"""`moestro profile`: run a model over text and keep what its experts did; and how a profile is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Json, Memory, Model, Quiet, Revision, Threads
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, progress, say, shaded, size, table

if TYPE_CHECKING:
    from moestro.core.layer import Runner
    from moestro.profile.data import Texts
    from moestro.profile.probe import Probe
    from moestro.profile.profile import Profile

EPILOG = """Examples:

\b
  moestro profile ./model book.txt -o book.profile
  moestro profile ./model corpus/ --label folder --tokens 200000 -o corpus.profile
  moestro profile ./model de=german.txt en=english.txt -o languages.profile --memory 4GiB
  moestro profile ./model chats.jsonl --label part -o chats.profile     prompt and answer apart
  moestro profile ./model book.txt -o book.profile --probe norms --probe moments:full=true
  moestro profile ./model book.txt -o book.profile --resume             go on where it stopped
  moestro show book.profile --measure balance

DATA is a text file, JSON lines (text, messages or tokens), a folder of them, or a data set on the Hub; NAME=DATA labels all of it NAME.
Without --probe and --for all cheap probes run (moestro methods --kind probe). An expert that was never chosen makes the exit code 1,
unless --allow-unseen is given; the profile is written in any case."""


def profile(
    model: Model,
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Text to read.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PROFILE", help="The file to write.", show_default=False)],
    label: Annotated[
        str, typer.Option(metavar="HOW", help="Labels: file, folder, column:NAME, part (prompt and answer) or none.")
    ] = "file",
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where JSON rows have their text or chat.", show_default=False)
    ] = None,
    part: Annotated[str, typer.Option(help="Of chats count all, only the prompt, or only the answer.")] = "all",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Read this many tokens, as many of each label.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens per sequence; the rest repeats the end of the one before.", show_default=False),
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="Run this probe beside the cheap ones.", show_default=False),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--for", metavar="METHOD", help="Run what this method needs, and counts; may be repeated.", show_default=False
        ),
    ] = None,
    ppl: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Search how many neurons can be skipped until perplexity rises by so much; reads the text 14 times more.",
            show_default=False,
        ),
    ] = None,
    trace_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the trace kept beside the profile; 0 for none.")] = 65536,
    trace_weights: Annotated[bool, typer.Option("--trace-weights", help="Keep the weights in the trace too.")] = False,
    memory: Memory = None,
    runner: Annotated[str, typer.Option(help="engine (any size), transformers (in memory, sees more), or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    threads: Threads = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a profile that was stopped.")] = False,
    allow_unseen: Annotated[bool, typer.Option("--allow-unseen", help="Experts that were never chosen are no failure.")] = False,
    revision: Revision = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Run MODEL over DATA and write what its experts did to PROFILE."""
    from moestro.cli.arguments import with_revision
    from moestro.cli.run import check_target
    from moestro.core.errors import ProfileError
    from moestro.profile.coverage import coverage
    from moestro.profile.data import cut
    from moestro.profile.run import Recording
    from moestro.profile.sources import read

    partial = Path(f"{output}.partial")
    check_target(output, "--output")
    if partial.exists() and not resume:
        raise ProfileError(
            f"an unfinished profile is at {partial}", expected="none, or --resume", fix=f"give --resume, or remove {partial}"
        )
    if runner not in ("auto", "engine", "transformers"):
        bad_argument(f"--runner is {runner!r}", "auto, engine or transformers")
    if ppl is not None:
        if runner == "engine" or memory is not None:
            bad_argument(
                "--ppl changes the model's experts, which the engine does not let it", "a model in memory", "leave out --memory"
            )
        runner = "transformers"
    documents = read(data, label="none" if label == "part" else label, text_column=text_column)
    name = with_revision(model, revision)
    with _opened(name, runner, memory, dtype, threads, length) as running:
        limits = min(length, running.facts.context)
        if limits < length and not quiet:
            say(f"sequences have {limits} tokens, the context of the model")
        texts = cut(
            documents,
            _tokenizer(name),
            length=limits,
            stride=stride,
            tokens=tokens,
            part=part,
            by_part=label == "part",
        )
        probes = choose([*(probe or ()), *(["sparsity"] if ppl is not None else ())], methods, running, texts)
        recording = Recording(running, texts, probes, trace_tokens=trace_tokens, trace_weights=trace_weights)
        if resume and partial.exists():
            recording.restore(partial)
        if not quiet and not as_json:
            say(
                f"{texts.tokens} tokens in {len(texts.sequences)} sequences, {len(probes)} probes, {size(recording.nbytes)} of statistics"
            )
        with progress("profiling", "tokens", quiet or as_json) as report:
            recording.run(running, save=partial, progress=report)
        made = recording.profile()
        made.info["model_name"] = name
        if ppl is not None:
            from moestro.profile.skipping import ppl_sparsity

            with progress("searching", "steps", quiet or as_json) as report:
                made.info["ppl_sparsity"] = ppl_sparsity(running, texts, made, ppl, report)
    made.save(output)
    partial.unlink(missing_ok=True)
    covered = coverage(made)
    if as_json:
        emit(facts_of(made) | {"output": str(output), "coverage": covered.to_json()})
    elif not quiet:
        print(f"{output}: {made.tokens} tokens, {len(made.arrays)} statistics")
    if (not quiet and not as_json) or (covered.unseen and not allow_unseen):
        say(*covered.told())
    return 1 if covered.unseen and not allow_unseen else 0


def _opened(name: str, runner: str, memory: str | None, dtype: str, threads: int | None, length: int) -> Any:
    """The model as a runner and context manager: the engine, or transformers when it was asked for or nothing speaks against it."""
    from contextlib import nullcontext
    from importlib.util import find_spec

    from moestro.engine.memory import available
    from moestro.engine.sizes import parse_size
    from moestro.models.checkpoint import Checkpoint

    if runner == "transformers" and memory is not None:
        bad_argument("--runner transformers keeps the whole model in memory and --memory is given", "one of them")
    checkpoint = Checkpoint.open(name)
    whole = sum(ref.nbytes for ref in checkpoint.tensors.values())
    if runner == "auto":
        fits = 2 * whole < available() and find_spec("torch") is not None and find_spec("transformers") is not None
        runner = "transformers" if memory is None and fits else "engine"
    if runner == "transformers":
        import torch

        from moestro.models.open import open_model

        if threads is not None:
            torch.set_num_threads(threads)
        return nullcontext(open_model(checkpoint, dtype))
    from moestro.engine.engine import Engine
    from moestro.models.families import describe

    context = min(length, describe(checkpoint).facts.context)
    budget = parse_size(memory) if memory is not None else None
    return Engine.open(name, memory=budget, threads=threads, context=context, dtype=dtype)


def _tokenizer(name: str) -> Any:
    """The model's tokenizer, None when it has none."""
    from moestro.models.hub import locate
    from moestro.models.tokenizer import Tokenizer

    folder = locate(name)
    return Tokenizer.open(folder) if (folder / "tokenizer.json").is_file() else None


def choose(probe: list[str] | None, methods: list[str] | None, running: Runner, texts: Texts) -> dict[str, Probe]:
    """The probes asked for: with --for what the methods need and the counts, else the cheap ones; and each --probe."""
    from moestro.cli.arguments import method_choice
    from moestro.core.layer import AttentionAccess
    from moestro.core.method import card_of, load
    from moestro.profile.probe import make, needed_by, requires, standard
    from moestro.profile.run import available

    names = ["counts", *needed_by(map(_planned, methods))] if methods else standard(available(running, texts))
    choices: dict[str, dict[str, Any]] = {}
    for text in [*names, *(probe or ())]:
        short, options = method_choice(text)
        choices.setdefault(card_of(load(short, "probe")).name, {}).update(options)
    made = make(choices)
    if "attention" in requires(made) and isinstance(running, AttentionAccess):
        running.show_attention()
    return made


def _planned(name: str) -> str:
    """The full name of the compression method that `moestro plan NAME` takes, where there is one; else the name as it is."""
    from moestro.compress.planner import KINDS
    from moestro.core.method import catalogue

    full = [row["name"] for row in catalogue() if row["kind"] in KINDS and row["name"].rpartition(".")[2] == name]
    return full[0] if len(full) == 1 else name


def facts_of(made: Profile) -> dict[str, Any]:
    """What a profile is of, JSON-ready."""
    return {
        "model": made.model,
        "family": made.family,
        "tokens": made.tokens,
        "labels": [{"label": n, "tokens": t} for n, t in zip(made.labels, made.tokens_G)],
        "layers": list(made.layers),
        "probes": {name: dict(options) for name, options in made.probes.items()},
        "statistics": {name: list(array.shape) for name, array in made.arrays.items()},
        "trace_tokens": made.trace.tokens if made.trace is not None else 0,
        "sources": list(made.sources),
        "data": made.data,
    }


def show_profile(file: Path, measure: list[str] | None, as_json: bool) -> None:
    """Print what is in a profile, or what measures say of it."""
    from moestro.profile.profile import Profile

    made = Profile.open(file)
    if measure:
        _show_measures(made, measure, as_json)
        return
    if as_json:
        emit(facts_of(made) | {"counts": made.arrays["counts_LE"].tolist()} if "counts_LE" in made.arrays else facts_of(made))
        return
    kept = f"{made.trace.tokens} of them in its trace" if made.trace is not None else "no trace"
    print(f"{made.tokens} tokens ({kept}), {len(made.layers)} MoE layers, model {made.model[:12]}\n")
    print(table(("label", "tokens"), list(zip(made.labels, made.tokens_G))))
    print("\nprobes: " + ", ".join(name.rsplit(".", 1)[-1] for name in made.probes))
    if "counts_LE" in made.arrays:
        rows = []
        for number, (counts_E, facts) in enumerate(zip(made.arrays["counts_LE"], made.layers)):
            own_E = counts_E[: facts["num_experts"]]
            drawn = "".join(shaded(c / max(1, own_E.max())) for c in own_E)
            rows.append((number, f"{(own_E > 0).sum()}/{len(own_E)}", drawn))
        print(
            "\n" + table(("layer", "used", "how often each expert was chosen (darkest: the layer's most chosen; · never)"), rows)
        )
    print("\nmore: moestro show PROFILE --measure NAME (moestro methods --kind measure)")


def _show_measures(made: Profile, measure: list[str], as_json: bool) -> None:
    from moestro.cli.arguments import method_choice
    from moestro.core.method import card_of, load
    from moestro.profile.measure import apply

    told: dict[str, Any] = {}
    for text in measure:
        name, options = method_choice(text)
        fn = load(name, "measure")
        found, card = apply(fn, made, options), card_of(fn)
        if as_json:
            told[card.name] = found.to_json()
            continue
        print(f"{'' if text == measure[0] else chr(10)}{card.title}\n")
        print(table(found.columns, [[_cell(c) for c in row] for row in found.rows]))
        print("".join(f"\n{note}" for note in found.notes), end="\n" if found.notes else "")
    if as_json:
        emit(told)


def _cell(value: Any) -> str:
    return "-" if value is None or value != value else f"{value:.4g}" if isinstance(value, float) else str(value)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(profile)
