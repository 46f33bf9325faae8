"""`moestro inspect`: a model's layers, sizes and routers from its headers, and what fits in which memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moestro.cli.arguments import Context, Json, Model, Revision, with_revision
from moestro.cli.output import emit, say, size, table

if TYPE_CHECKING:
    from moestro.core.layer import LayerFacts, RouterFacts
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.layout import Layout

EPILOG = """Examples:

\b
  moestro inspect allenai/OLMoE-1B-7B-0924
  moestro inspect ./my-moe --budgets 2GiB,4GiB,8GiB
  moestro inspect ./my-moe --no-probe --json"""
USUAL_RUNTIME = 400 << 20  # with torch and transformers
SCORES = {
    "softmax": "softmax over all experts",
    "sigmoid": "a sigmoid per expert",
    "logits": "raw logits",
    "sparsemixer": "sparsemixer (arg-max with jitter masks)",
}
WEIGHTS = {
    "probs": "weights are the chosen scores",
    "softmax_after": "weights are a softmax over the chosen ones",
    "sigmoid_after": "weights are a sigmoid of the chosen ones",
    "masked_softmax": "weights are softmaxes over what each mask leaves",
}


def inspect(
    model: Model,
    revision: Revision = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Budgets to try, divided by commas; a range around the model's size if not given.",
            show_default=False,
        ),
    ] = None,
    context: Context = None,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Measure the disk for a forecast of tokens/s.")] = True,
    as_json: Json = False,
) -> None:
    """Show what a model is made of and what fits in which memory. Reads headers only."""
    from moestro.engine.sizes import parse_size
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.families import describe

    checkpoint = Checkpoint.open(with_revision(model, revision))
    layout = describe(checkpoint)
    asked = [parse_size(text) for text in budgets.split(",")] if budgets else None
    fits = what_fits(checkpoint, layout, asked, context, probe)
    if as_json:
        emit(as_data(checkpoint, layout, fits))
    else:
        print(as_text(checkpoint, layout, fits))
        if layout.ignored:
            more = ", ..." if len(layout.ignored) > 4 else ""
            say(f"note: {len(layout.ignored)} tensors are not used by the model: {', '.join(layout.ignored[:4])}{more}")


def what_fits(
    checkpoint: Checkpoint, layout: Layout, budgets: list[int] | None, context: int | None, probe: bool
) -> list[dict[str, Any]]:
    """One row per budget: slots, share of the experts in memory and, with `probe`, a forecast; or what it would take."""
    from moestro.core.errors import BudgetError
    from moestro.core.experts import ExpertKey
    from moestro.engine.residency import MEMORY_PROBED, plan_residency
    from moestro.kernels import bandwidth, reader

    parts = layout.parts(ExpertKey(0, 0))
    known: dict[str, Any] = {
        "runtime_bytes": runtime(checkpoint, layout),
        "disk_rate": 1.0,
        "memory_rate": 1.0,
        "context": context,
    }
    if probe:
        known["disk_rate"] = reader.probe(parts[0].file, max(part.nbytes for part in parts))
        known["memory_rate"] = bandwidth.probe(nbytes=MEMORY_PROBED)
    experts = sum(layer.num_experts for layer in layout.facts.layers)
    rows = []
    for budget in budgets or around(checkpoint, layout, known):
        row: dict[str, Any] = {"memory": budget}
        try:
            plan = plan_residency(checkpoint, layout, budget, **known)
        except BudgetError as error:
            row |= {"works": False, "smallest": error.smallest}
        else:
            row |= {"works": True, "slots": sum(plan.slots), "resident_share": sum(plan.slots) / experts}
            row["forecast"] = asdict(plan.forecast) if probe and plan.forecast else None
        rows.append(row)
    return rows


def around(checkpoint: Checkpoint, layout: Layout, known: dict[str, Any]) -> list[int]:
    """Budgets worth looking at: the smallest that works, those that hold a quarter, a half and three quarters of the experts, all of them."""
    from moestro.core.errors import BudgetError
    from moestro.engine.residency import SHARE, plan_residency

    try:
        plan_residency(checkpoint, layout, 1, **known)
    except BudgetError as error:
        smallest = error.smallest or 0
    else:
        raise AssertionError("one byte is never enough")
    step = 64 << 20 if layout.facts.expert_bytes > 1 << 30 else 1 << 20
    # The planner spends up to SHARE of what is left on longer prefill passes, the rest on experts.
    sizes = [smallest + int(layout.facts.expert_bytes * share / (1 - SHARE)) for share in (0.25, 0.5, 0.75, 1)]
    return list(dict.fromkeys([-(-smallest // (1 << 20)) << 20, *(-(-size // step) * step for size in sizes)]))


def runtime(checkpoint: Checkpoint, layout: Layout) -> int:
    """Bytes that Python and its libraries take before any weight is loaded; a usual figure where torch is needed and not installed."""
    from importlib.util import find_spec

    from moestro.engine import memory
    from moestro.engine.native import choose_trunk

    torch = choose_trunk(checkpoint, layout) == "transformers"
    if torch and not (find_spec("torch") and find_spec("transformers")):
        return USUAL_RUNTIME
    return memory.runtime_bytes(torch=torch)


def router_in_words(router: RouterFacts, top_k: int) -> str:
    """A router's arithmetic as one phrase."""
    words = [SCORES.get(router.score, router.score)]
    if router.selection_bias:
        words.append("a bias that changes the choice only")
    if router.groups > 1:
        words.append(f"the best {router.groups_kept} of {router.groups} groups")
    words += [f"top {top_k}", WEIGHTS.get(router.weights, router.weights)]
    if router.renormalised:
        words.append("renormalised to sum 1")
    if router.scale != 1:
        words.append(f"times {router.scale:g}")
    return ", ".join(words)


def expert_in_words(layer: LayerFacts) -> str:
    spec = layer.spec
    gate = "gated " if spec.gated else ""
    extras = [text for text, there in (("bias", spec.bias), ("weighted at the input", spec.weigh_input)) if there]
    return f"{gate}{spec.activation} {spec.d_model} x {spec.d_expert}" + (f" ({', '.join(extras)})" if extras else "")


def as_data(checkpoint: Checkpoint, layout: Layout, fits: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything known, JSON-ready."""
    facts = layout.facts
    layers = [asdict(la) | {"router_in_words": router_in_words(la.router, la.top_k)} for la in facts.layers]
    return {
        "model": checkpoint.source,
        "path": str(checkpoint.path),
        **asdict(facts),
        "extra": dict(facts.extra),
        "layers": layers,
        "total_bytes": facts.trunk_bytes + facts.expert_bytes,
        "active_bytes_per_token": facts.trunk_bytes + facts.active_expert_bytes,
        "active_expert_bytes_per_token": facts.active_expert_bytes,
        "ignored_tensors": list(layout.ignored),
        "budgets": fits,
    }


def as_text(checkpoint: Checkpoint, layout: Layout, fits: list[dict[str, Any]]) -> str:
    """The report for people."""
    facts = layout.facts
    total = facts.trunk_bytes + facts.expert_bytes
    active = facts.trunk_bytes + facts.active_expert_bytes
    lines = [
        f"{checkpoint.source}: {facts.family}, {facts.dtype}, {facts.decoder_layers} layers ({len(facts.layers)} MoE), width {facts.d_model}, "
        f"vocabulary {facts.vocabulary}, context {facts.context}",
        f"{size(total)}: experts {size(facts.expert_bytes)} ({100 * facts.expert_bytes / total:.0f} %), everything else {size(facts.trunk_bytes)}; "
        f"one token uses {size(active)} ({100 * active / total:.0f} %), of it experts {size(facts.active_expert_bytes)}",
        f"fingerprint {facts.fingerprint[:12]}",
        "",
    ]
    rows = []
    for first, last in _runs(facts.layers):
        name = str(first.index) if first is last else f"{first.index}-{last.index}"
        shared = str(first.shared) if first.shared else "none"
        rows.append(
            (
                name,
                first.num_experts,
                first.top_k,
                shared,
                size(first.expert_bytes),
                expert_in_words(first),
                router_in_words(first.router, first.top_k),
            )
        )
    lines.append(table(("decoder layers", "experts", "top", "shared", "one expert", "arithmetic", "router"), rows))
    lines += ["", table(("memory", "slots", "in memory", "hits", "read per token", "tokens/s"), [_fit_row(row) for row in fits])]
    return "\n".join(lines)


def _runs(layers: tuple[LayerFacts, ...]) -> list[tuple[LayerFacts, LayerFacts]]:
    """First and last of each run of equal layers that follow one another."""
    runs: list[tuple[LayerFacts, LayerFacts]] = []
    for layer in layers:
        if (
            runs
            and layer.index == runs[-1][1].index + 1
            and replace(layer, ordinal=0, index=0) == replace(runs[-1][0], ordinal=0, index=0)
        ):
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer, layer))
    return runs


def _fit_row(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["works"]:
        return (size(row["memory"]), "-", "-", "-", "-", f"too small, {size(row['smallest'])} works")
    forecast = row["forecast"]
    told = ("-", "-", "not measured")
    if forecast:
        told = (
            f"{100 * forecast['hit_rate']:.0f} %",
            size(forecast["missed_bytes_per_token"]),
            f"{forecast['tokens_per_second_low']:.1f}-{forecast['tokens_per_second_high']:.1f}",
        )
    return (size(row["memory"]), str(row["slots"]), f"{100 * row['resident_share']:.0f} %", *told)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(inspect)
