"""Arguments that several verbs share: the model, sizes of memory, --json, method options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moestro.cli.errors import bad_argument

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, org/name@revision, or a folder.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Write the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no remarks.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)]
Memory = Annotated[
    str | None, typer.Option("--memory", "-m", metavar="SIZE", help="All the memory moestro may use, such as 2GiB.")
]
Context = Annotated[
    int | None,
    typer.Option(
        "--ctx-size", "--context", "-c", min=1, help="Tokens, prompt and answer together, to keep room for.", show_default=False
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Of the trunk: auto, bfloat16 or float32.", show_default=False)]
EvictionChoice = Annotated[
    str | None,
    typer.Option(
        "--eviction", metavar="NAME[:OPTION=VALUE,...]", help="Who leaves (moestro methods --kind eviction).", show_default=False
    ),
]
PredictorChoice = Annotated[
    str | None,
    typer.Option(
        "--predictor",
        metavar="NAME[:OPTION=VALUE,...]",
        help="What is read ahead (moestro methods --kind predictor).",
        show_default=False,
    ),
]
TrunkChoice = Annotated[
    str | None,
    typer.Option("--trunk", help="native (without torch), transformers, or auto.", show_default=False),
]
CodecChoice = Annotated[
    str | None,
    typer.Option(
        "--codec",
        help="How a packed store keeps the experts: stored, f32, f16, bf16, mxfp4, or int8, int4, uint4, int3, int2 or nested with the weights "
        "per scale, as in int4:32.",
        show_default=False,
    ),
]
TrunkCodecChoice = Annotated[
    str | None,
    typer.Option(
        "--trunk-codec",
        help="How the native trunk keeps its matrices: stored, mxfp4, or int8, int4, uint4, int3 or int2, as in int8:32.",
        show_default=False,
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Slots shared by all layers (global), divided among them (layer), or among the widths of experts in unlike bits (width).",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Compute threads; all cores if not given.", show_default=False)
]


def with_revision(model: str, revision: str | None) -> str:
    """`org/name@revision`. Raises InputError when the model names another one already."""
    if revision is None:
        return model
    if "@" in model:
        bad_argument(f"{model} names a revision and --revision is {revision}", "one of them")
    return f"{model}@{revision}"


def method_choice(text: str) -> tuple[str, dict[str, Any]]:
    """('lru', {}) of 'lru', and ('slru', {'share': 0.8}) of 'slru:share=0.8'. Raises InputError."""
    import json

    name, _, tail = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            bad_argument(f"{text!r} has the option {item!r}", "name=value, several divided by commas")
        try:
            options[key.strip()] = json.loads(value)
        except ValueError:
            options[key.strip()] = value
    return name, options


def residency_options(
    context: int | None,
    dtype: str | None,
    eviction: str | None,
    predictor: str | None,
    scope: str | None,
    trunk: str | None,
    trunk_codec: str | None,
) -> dict[str, Any]:
    """The options of `plan_residency` that were given on the command line, and only those."""
    options: dict[str, Any] = {"context": context, "dtype": dtype, "scope": scope, "trunk": trunk, "trunk_codec": trunk_codec}
    for kind, text in (("eviction", eviction), ("predictor", predictor)):
        if text is not None:
            options[kind], options[f"{kind}_options"] = method_choice(text)
    return {name: value for name, value in options.items() if value not in (None, {})}
