"""The `moestro` command: one verb per file, and one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

import moestro
from moestro.cli import apply, diff, doctor, errors, eval, export, inspect, methods, plan, profile, replay, run, show, train

EPILOG = """Examples:

\b
  moestro run "Why is the sky blue?"                     the embedded model, no download
  moestro inspect allenai/OLMoE-1B-7B-0924               sizes, and what fits in which memory
  moestro run allenai/OLMoE-1B-7B-0924 "Hello" --memory 4GiB
  moestro plan residency MODEL --memory 4GiB --trace t.trace -o plan.json
  moestro plan reap MODEL --profile book.profile --ratio 0.25 -o smaller.json

Exit codes: 0 done, 1 something would be skipped or an internal error, 2 cannot be done, 130 interrupted."""

app = typer.Typer(
    name="moestro",
    help="Run and study Mixture-of-Experts models on an ordinary machine.",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for module in (inspect, run, train, profile, plan, show, diff, apply, eval, export, replay, methods, doctor):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"moestro {moestro.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show tracebacks and debug logs (as MOESTRO_LOG=debug).")
    ] = False,
) -> None:
    if verbose:
        os.environ["MOESTRO_LOG"] = "debug"
    if level := os.environ.get("MOESTRO_LOG", "").upper():
        import logging

        logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", stream=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        code = app(arguments, prog_name="moestro", standalone_mode=False)
    except (KeyboardInterrupt, Exception) as error:
        usage: Any = error
        if hasattr(usage, "show") and hasattr(usage, "exit_code"):  # wrong usage, found by the parser
            usage.show()
            return int(usage.exit_code)
        return errors.report(error)
    if code == errors.INTERRUPTED:  # Ctrl-C: typer has turned it into its exit code
        return errors.report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0
