"""A conversation at the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from moestro.cli.errors import bad_argument
from moestro.cli.output import say

if TYPE_CHECKING:
    from moestro.engine.engine import Engine
    from moestro.engine.generate import Generation, Statistics
    from moestro.engine.sample import SamplingParams

HELP = "/exit or Ctrl-D ends, /clear forgets the conversation, Ctrl-C stops an answer (and at the prompt ends with code 130)"


def chat(engine: Engine, params: SamplingParams, system: str | None, quiet: bool) -> int:
    """Ask, answer, remember; returns the exit code and ends with an account of the whole conversation.

    Raises InputError for a model without a chat template.
    """
    from moestro.engine.generate import Statistics

    if not engine.tokenizer.templates:
        bad_argument("the model has no chat template", "a chat model", "give a prompt with --raw, which continues it as text")
    first = [{"role": "system", "content": system}] if system is not None else []
    if not quiet:
        say(HELP)
    told: list[Statistics] = []
    try:
        return talk(engine, params, first, quiet, told)
    finally:
        if told and not quiet:
            say("", Statistics.total(told).summary())


def talk(engine: Engine, params: SamplingParams, first: list[dict[str, Any]], quiet: bool, told: list[Statistics]) -> int:
    """The conversation until its end; every answer's statistics are added to `told`. What cannot be answered is not remembered."""
    from moestro.core.errors import InputError

    messages: list[dict[str, Any]] = [*first]
    while True:
        try:
            text = ask()
        except EOFError:
            return 0
        except UnicodeError:
            say("that was not UTF-8; nothing was sent")
            continue
        if not text:
            continue
        if text in ("/exit", "/quit"):
            return 0
        if text == "/clear":
            messages = [*first]
            continue
        if text.startswith("/"):
            say(HELP)
            continue
        messages.append({"role": "user", "content": text})
        try:
            generation = engine.generate([messages], params)
        except InputError as error:  # too long, most likely: the conversation so far is not lost
            messages.pop()
            say(f"moestro: {error}", "nothing was sent; /clear forgets the conversation so far and makes room")
            continue
        stream(generation)
        result, statistics = generation.results[0], generation.statistics
        if generation.interrupted:
            say("(stopped)")
        messages.append({"role": "assistant", "content": result.text})
        if statistics is not None:
            told.append(statistics)
            if not quiet:
                say(f"[{statistics.generated_tokens} tokens at {statistics.decode_rate:.1f}/s]")


def ask() -> str:
    """One line from the person; the prompt goes to stderr, so that stdout holds answers only. Raises EOFError, KeyboardInterrupt, UnicodeError."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        print(file=sys.stderr)
        raise EOFError
    line.encode("utf-8")  # in some locales Python lets bytes that are not UTF-8 through, as surrogates
    return line.strip()


def stream(generation: Generation) -> None:
    """Print the only sequence's text as it comes, and end the line."""
    last = ""
    for event in generation:
        if event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
            last = event.text
    if not last.endswith("\n"):
        print(flush=True)
