"""`moestro replay`: what every cache policy would have done with a recorded run, at every budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Json, Quiet
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, progress, say, table

if TYPE_CHECKING:
    from moestro.engine.replay import Sweep

EPILOG = """Examples:

\b
  moestro replay talk.trace
  moestro replay talk.trace ./model --budgets 512MiB,1GiB,2GiB    bytes of expert memory, and MB read per token
  moestro replay talk.trace --policies lru,lfu --scope layer --json
  moestro replay talk.trace ./model --png hits.png"""
SHARES = "10%,20%,30%,40%,50%,60%,75%,90%"


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="Recorded by `moestro run --trace`.", show_default=False)],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model, for sizes in bytes.", show_default=False)
    ] = None,
    budgets: Annotated[
        str, typer.Option(metavar="LIST", help="Expert memory: shares of all experts, or sizes with MODEL.")
    ] = SHARES,
    policies: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Eviction policies; all, with the optimum, if not given.", show_default=False),
    ] = None,
    scope: Annotated[str, typer.Option(help="Slots shared by all layers (global) or divided among them (layer).")] = "global",
    null: Annotated[bool, typer.Option("--null/--no-null", help="Beside it, the same run with uniform random routing.")] = True,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw hit rate against budget (needs matplotlib).", show_default=False)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Count hits and bytes of every policy at every budget by replaying a trace; runs no model."""
    from moestro.core.method import card_of, load
    from moestro.core.trace import Trace
    from moestro.engine.replay import BELADY, sweep

    read = Trace.open(trace)
    if not read.tokens:
        bad_argument(f"{trace} holds no tokens", "a trace of at least one pass", "record one with `moestro run ... --trace FILE`")
    if scope not in ("global", "layer"):
        bad_argument(f"--scope is {scope!r}", "global or layer")
    facts = None
    if model is not None:
        from moestro.models.checkpoint import Checkpoint
        from moestro.models.families import describe

        facts = describe(Checkpoint.open(model)).facts
        read.check_model(facts.fingerprint)
    chosen = None
    if policies is not None:
        names = [card_of(load(name.strip(), "eviction")).name for name in policies.split(",")]
        chosen = list(dict.fromkeys([*names, BELADY]))
    with progress("replaying", "runs", quiet or as_json) as report:
        done = sweep(read, facts, parse_budgets(budgets), chosen, scope=scope, null=null, progress=report)
    if png is not None:
        from moestro.cli.plot import hit_rates

        hit_rates(done, png, f"{read.tokens} tokens, {read.layers} MoE layers, scope {scope}")
        if not quiet:
            say(f"drawn in {png}")
    if as_json:
        emit(done.to_json())
    else:
        print(as_text(done))


def parse_budgets(text: str) -> list[float]:
    """Shares of all experts ('25%', '0.25') as numbers up to 1, sizes ('2GiB') as bytes. Raises InputError."""
    from moestro.engine.sizes import parse_size

    out: list[float] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        share = item.removesuffix("%")
        try:
            value = float(share) / (100 if item.endswith("%") else 1)
        except ValueError:
            value = float(parse_size(item))
        else:
            if not 0 < value <= 1:
                bad_argument(f"--budgets has {item}", "shares such as 25% or 0.25, or sizes such as 2GiB")
        out.append(value)
    if not out:
        bad_argument("--budgets is empty", "shares such as 25%, or sizes such as 2GiB")
    return out


def as_text(done: Sweep) -> str:
    """One table per phase that has tokens."""
    parts = []
    for phase in ("decode", "prefill"):
        tokens = getattr(done.reports[0], f"{phase}_tokens")
        if tokens and not any(getattr(report, phase).hits for report in done.reports):
            parts.append(f"{phase}, {tokens} tokens: no policy finds anything in memory, every expert is used for the first time")
        elif tokens:
            parts.append(
                f"{phase}, {tokens} tokens: share of demands found in memory" + _bytes_told(done) + "\n" + _phase(done, phase)
            )
    return "\n\n".join(parts)


def _bytes_told(done: Sweep) -> str:
    return ", and MB read per token" if any(size for size, _ in done.budgets) else ""


def _phase(done: Sweep, phase: str) -> str:
    rows: dict[tuple[str, str], list[Any]] = {}
    for report in done.reports:
        name = report.eviction.rsplit(".", 1)[-1]
        row = rows.setdefault((report.routing, name), [name, report.routing])
        cell = f"{100 * getattr(report, phase).hit_rate:.1f} %"
        if any(report.missed_bytes):
            cell += f" {report.missed_bytes_per_token(prefill=phase == 'prefill') / 1e6:.1f}"
        row.append(cell)
    header = ["policy", "routing", *(f"{slots} slots ({100 * slots / done.experts:.0f} %)" for _, slots in done.budgets)]
    return table(header, list(rows.values()))


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(replay)
