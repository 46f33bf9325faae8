"""`moestro export`: a model in the form that another program reads, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moestro.cli.arguments import Json, Model
from moestro.cli.errors import bad_argument
from moestro.cli.output import emit, say, size

EPILOG = """Examples:

\b
  moestro export ./small -o ./for-vllm --to compressed-tensors --allow-plain lm_head.weight
  moestro export ./small -o small.gguf --to gguf
  moestro export ./nested -o ./two --to planes --bits 2

compressed-tensors takes models coded in int8:G, int4:G or mxfp4 by `moestro plan bits` and `moestro apply`; gguf takes these, uint4:G and
plain ones of Mixtral, OLMoE and Qwen3-MoE; planes takes nested:G, and writes the model that its first bits are. Only planes changes numbers."""


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The new folder or file.", show_default=False)],
    to: Annotated[str, typer.Option(metavar="FORM", help="compressed-tensors, gguf, or planes.")],
    allow_plain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Patterns, or ends of the names, of weights that may stay plain; may be repeated.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Tensors the model does not load that may be lost; may be repeated.", show_default=False
        ),
    ] = None,
    pre: Annotated[
        str, typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognised.", show_default=False)
    ] = "",
    bits: Annotated[int, typer.Option(min=2, max=3, help="With planes: how many bits of weights in nested are kept.")] = 2,
    as_json: Json = False,
) -> None:
    """Write a model for vLLM (compressed-tensors) or llama.cpp (gguf), or the low planes of a nested one. What has no place is an error."""
    from moestro.cli.run import check_target
    from moestro.models.checkpoint import Checkpoint
    from moestro.models.taps import read_taps

    checkpoint = Checkpoint.open(model)
    if read_taps(checkpoint) and to != "planes":
        say(f"{model} skips experts when moestro runs it; other programs will run every expert")
    if to == "gguf":
        check_target(output, "--output")
        if allow_plain:
            bad_argument("--allow-plain is for compressed-tensors", "none: a GGUF file holds plain weights as they are")
        from moestro.compress.export.gguf import gguf

        nbytes = gguf(checkpoint, output, pre=pre, dropped=tuple(drop or ())).stat().st_size
    elif to == "planes":
        if pre or allow_plain or drop:
            bad_argument("--pre, --allow-plain and --drop are for other forms", "--bits alone")
        from moestro.compress.export.planes import planes

        nbytes = planes(checkpoint, output, bits=bits).nbytes
    elif to == "compressed-tensors":
        if pre:
            bad_argument("--pre is for gguf", "none")
        from moestro.compress.export.compressed_tensors import compressed_tensors

        nbytes = compressed_tensors(checkpoint, output, allow_plain=tuple(allow_plain or ()), dropped=tuple(drop or ())).nbytes
    else:
        bad_argument(f"{to!r} is no form that is written", "compressed-tensors or gguf, or planes")
    if as_json:
        emit({"output": str(output), "form": to, "bytes": nbytes})
    else:
        print(f"{output}: {size(nbytes)}, the {f'first {bits} bits' if to == 'planes' else 'numbers'} of {model}")


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(export)
