"""`moestro show`: a plan's summary, a trace's counts drawn layer by layer, or what a profile says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Json, Quiet
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, shaded, table

if TYPE_CHECKING:
    from moestro.core.trace import Trace

EPILOG = """Examples:

\b
  moestro show plan.json
  moestro show talk.trace
  moestro show talk.trace --json
  moestro show book.profile
  moestro show book.profile --measure balance --measure srp:window=16
  moestro show book.profile --html atlas.html                      one page to explore in a browser
  moestro show book.profile --figure map:statistic=load -o load.svg

Figures: map (statistic, label), labels (layer, most), flow (layer), together (layer), similarity (layer), affinity, cache."""


def show(
    file: Annotated[Path, typer.Argument(metavar="PLAN|TRACE|PROFILE", help="A plan (JSON), a trace or a profile.")],
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="What this measure says of a profile.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw all of a profile in one HTML page.", show_default=False)
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option(metavar="NAME[:OPTION=VALUE,...]", help="Draw this figure of a profile into --output.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf, with --figure.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Whose tokenizer writes the page's tokens; by default the profiled one's, if it is at hand.",
            show_default=False,
        ),
    ] = None,
    cache_tokens: Annotated[int, typer.Option(min=0, help="Tokens replayed for cache curves; 0 for none.")] = 1024,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what is in a plan, a trace or a profile, or draw a profile."""
    from moestro.cli.atlas import draw_figure, write_atlas
    from moestro.cli.profile import show_profile
    from moestro.core.errors import InputError
    from moestro.core.plan import read_plan
    from moestro.core.trace import Trace
    from moestro.profile.profile import is_profile

    if file.is_dir():
        raise InputError(f"{file} is a folder", expected="a plan, a trace or a profile", fix=f"moestro inspect {file}")
    try:
        with open(file, "rb") as f:
            is_plan = f.read(64).lstrip()[:1] == b"{"
    except FileNotFoundError as error:
        raise InputError(f"there is no file {file}", expected="a plan, a trace or a profile") from error
    wanted = [name for name, value in (("--measure", measure), ("--html", html), ("--figure", figure)) if value]
    if len(wanted) > 1:
        bad_argument(f"{' and '.join(wanted)} are given", "one of them")
    if (figure is None) != (output is None):
        bad_argument("--figure and --output go together", "--figure map -o map.svg")
    if model is not None and html is None:
        bad_argument("--model is for the page", "--html FILE beside it")
    if not is_plan and is_profile(file):
        if html is not None:
            write_atlas(file, html, model, cache_tokens, quiet, as_json)
        elif figure is not None and output is not None:
            draw_figure(file, figure, output, cache_tokens, quiet, as_json)
        else:
            show_profile(file, measure, as_json)
        return
    if wanted:
        raise InputError(
            f"{file} is no profile", expected=f"a profile with {wanted[0]}", fix="moestro profile MODEL DATA -o PROFILE"
        )
    if is_plan:
        plan = read_plan(file)
        if as_json:
            emit(plan.to_json())
        else:
            subjects = ", ".join(f"{s.path} ({s.fingerprint[:12]})" for s in plan.subjects)
            print(f"{plan.kind} plan by {plan.method} for {subjects}\n{plan.summary()}")
        return
    facts = describe_trace(Trace.open(file))
    if as_json:
        emit(facts)
        return
    print(
        f"{facts['tokens']} tokens ({facts['prefill_tokens']} of prefill) in {facts['sequences']} sequences and {facts['steps']} passes, "
        f"{len(facts['layers'])} MoE layers, model {facts['model'][:12]}\n"
    )
    rows = []
    for la in facts["layers"]:
        top = max(la["counts"]) or 1
        drawn = "".join(shaded(c / top) for c in la["counts"])
        rows.append(
            (la["layer"], f"{la['used']}/{len(la['counts'])}", f"{la['balance']:.2f}", f"{100 * la['repeated']:.0f} %", drawn)
        )
    print(
        table(
            (
                "layer",
                "used",
                "balance",
                "repeated",
                "how often each expert was chosen (darkest: the layer's most chosen; · never)",
            ),
            rows,
        )
    )
    print("\nbalance: entropy of the counts, 1 is even. repeated: experts that the same sequence's previous token chose as well.")


def describe_trace(trace: Trace) -> dict[str, Any]:
    """Counts and locality of each layer, as plain data."""
    import numpy as np

    order_T = np.argsort(
        trace.sequences_T, kind="stable"
    )  # batched sequences take turns; here each one's tokens follow one another
    same_T = np.diff(trace.sequences_T[order_T]) == 0
    counts_LE = trace.counts()
    layers = []
    for layer, experts in enumerate(trace.num_experts):
        counts_E = counts_LE[layer, :experts]
        share_E = counts_E[counts_E > 0] / max(1, counts_E.sum())
        ids_TK = np.asarray(trace.experts_LTK[layer])[order_T]
        now, before = ids_TK[1:][same_T], ids_TK[:-1][same_T]
        again = ((now[:, :, None] == before[:, None, :]) & (now >= 0)[:, :, None]).any(-1).sum()
        layers.append(
            {
                "layer": layer,
                "used": int((counts_E > 0).sum()),
                "balance": float(abs((share_E * np.log(share_E)).sum()) / np.log(experts)) if experts > 1 else 1.0,
                "repeated": float(again / max(1, (now >= 0).sum())),
                "counts": counts_E.tolist(),
            }
        )
    return {
        "tokens": trace.tokens,
        "prefill_tokens": int(np.asarray(trace.prefill_T).sum()),
        "sequences": len(np.unique(trace.sequences_T)),
        "steps": sum(1 for _ in trace.steps()),
        "model": trace.model,
        "info": trace.info,
        "layers": layers,
    }


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(show)
